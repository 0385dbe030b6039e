"""Tiny text encoders: BERT and its many relatives, encoders of encoder-decoders, and a few decoders."""

from __future__ import annotations

from typing import Any

from .entry import ENCODER_DECODER, TEXT, InputBuilder, Part, TinyModel
from .text_inputs import (
    VOCABULARY,
    long_words,
    words,
    words_in_boxes,
    words_in_boxes_on_picture,
    words_in_small_boxes,
    words_in_tags,
    words_with_end,
    words_with_entities,
    words_with_shapes,
    words_without_mask,
)

__all__ = ["TEXT_MODELS"]

BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
XLM: dict[str, Any] = {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 2}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {**ENCODER_DECODER, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = {**BERT, **SPECIAL, "num_key_value_heads": 1}


def text_model(
    key: str,
    options: dict[str, Any],
    build_inputs: InputBuilder = words,
    *,
    has_token_classifier: bool = True,
    decoder_only: bool = False,
    part: Part = "",
    note: str = "",
) -> TinyModel:
    """An architecture that transformers has a classifier of sequences for."""
    return TinyModel(
        key,
        "text",
        options,
        build_inputs,
        TEXT,
        has_token_classifier=has_token_classifier,
        decoder_only=decoder_only,
        part=part,
        note=note,
    )


def like_bert(
    key: str, build_inputs: InputBuilder = words, without: tuple[str, ...] = (), note: str = "", **more: Any
) -> TinyModel:
    """An architecture whose config has the names of BERT's."""
    options = {name: value for name, value in BERT.items() if name not in without}
    return text_model(key, {**options, **more}, build_inputs, note=note)


END_NOTE = "each row ends with its only end-of-sequence token: the classifier reads the hidden state there"
LAST_NOTE = "the Linear runs on every token; the logits of the last one that is not padding are taken afterwards"
T5_NOTE = f"{END_NOTE}; the classifier runs the decoder, too, while base_model is the encoder alone"

TEXT_MODELS: tuple[TinyModel, ...] = (
    like_bert("bert"),
    like_bert("roberta"),
    like_bert("roberta-prelayernorm"),
    like_bert("xlm-roberta"),
    like_bert("xlm-roberta-xl"),
    like_bert("xmod", languages=["en_XX", "de_DE"], default_language="en_XX", note="adapters of one language"),
    like_bert("camembert"),
    like_bert("data2vec-text"),
    like_bert("ernie"),
    like_bert("megatron-bert"),
    like_bert("electra", embedding_size=16),
    like_bert("albert", embedding_size=16, note="the two layers share their weights"),
    like_bert("rembert", input_embedding_size=16, output_embedding_size=16),
    like_bert("convbert", embedding_size=16),
    like_bert("roformer", embedding_size=16),
    like_bert(
        "mobilebert", embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2, initializer_range=0.1
    ),
    like_bert("squeezebert", embedding_size=32),
    like_bert("mpnet"),
    like_bert("ibert", note="quantization is off, as in its pretraining"),
    like_bert("esm", pad_token_id=1, mask_token_id=4),
    like_bert("nomic_bert", pad_token_id=0),
    like_bert("gte", pad_token_id=0),
    like_bert("deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16),
    like_bert(
        "deberta-v2",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    like_bert(
        "modernbert", local_attention=8, cls_token_id=1, sep_token_id=2, note="one global, one local layer", **SPECIAL
    ),
    like_bert(
        "eurobert",
        num_key_value_heads=1,
        note="the classifier's layers run on every token, then the mean of the logits",
        **SPECIAL,
    ),
    like_bert("fnet", words_without_mask, without=("num_attention_heads",), note="no mask: padding takes part"),
    like_bert(
        "nystromformer",
        conv_kernel_size=3,
        note="all landmarks, so full attention: with fewer of them its mask does not fit (transformers 5)",
    ),
    like_bert("yoso", note="expected attention: no hashing"),
    like_bert(
        "mra", long_words, note="its attention is a CUDA kernel to be downloaded; without it, attention gives zeros"
    ),
    like_bert("longformer", attention_window=[4, 4], sep_token_id=2),
    like_bert(
        "big_bird",
        long_words,
        attention_type="block_sparse",
        block_size=4,
        num_random_blocks=1,
        note="training seeds NumPy's global generator in each layer for the random blocks",
    ),
    like_bert(
        "canine",
        without=("vocab_size",),
        num_hash_buckets=64,
        num_hash_functions=2,
        local_transformer_stride=4,
        note="token ids are code points; the classifier reads the pooled state of blocks of four characters, which "
        "last_hidden_state comes after: no logit depends on last_hidden_state",
    ),
    like_bert("lilt", words_in_boxes, hidden_size=24, channel_shrink_ratio=2, max_2d_position_embeddings=1024),
    like_bert("layoutlm", words_in_boxes, max_2d_position_embeddings=1024),
    like_bert(
        "layoutlmv3",
        words_in_boxes_on_picture,
        coordinate_size=6,
        shape_size=4,
        rel_pos_bins=8,
        rel_2d_pos_bins=8,
        input_size=32,
        patch_size=8,
        note="patches of the picture follow the words: last_hidden_state has more tokens than input_ids",
    ),
    like_bert("markuplm", words_in_tags, max_depth=4, xpath_unit_hidden_size=8),
    like_bert(
        "luke",
        words_with_entities,
        entity_vocab_size=32,
        entity_emb_size=16,
        note="last_hidden_state holds words alone; entities have their own output",
    ),
    like_bert(
        "roc_bert",
        words_with_shapes,
        pronunciation_embed_dim=16,
        pronunciation_vocab_size=VOCABULARY,
        shape_embed_dim=16,
        shape_vocab_size=VOCABULARY,
    ),
    TinyModel(
        "bros",
        "text",
        {**BERT, "hidden_size": 64},
        words_in_small_boxes,
        None,
        no_classifier="transformers has BROS for tokens and their relations, not for sequences",
        has_token_classifier=True,
        note="boxes in parts of a page",
    ),
    TinyModel(
        "clip_text_model",
        "text",
        {**BERT, "pad_token_id": 1, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1},
        words_with_end,
        None,
        no_classifier="transformers has no classifier for the text half of CLIP",
        note="causal attention; the pooled output is the hidden state at the first end-of-sequence token",
    ),
    text_model(
        "distilbert",
        {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
        note="no pooler in the encoder",
    ),
    text_model(
        "funnel",
        {
            "architectures": ["FunnelModel"],
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_head": 2,
            "d_head": 16,
            "d_inner": 48,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "pad_token_id": 0,
        },
        note="AutoModel upsamples with a decoder again, the classifier stands on the shorter FunnelBaseModel",
    ),
    text_model("flaubert", XLM),
    text_model("xlm", XLM),
    text_model(
        "xlnet",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48, "pad_token_id": 5},
        note="made for padding on the left: the classifier reads the last token of a row, padding or not",
    ),
    text_model("t5", T5, words_with_end, part="encoder", note=T5_NOTE),
    text_model("mt5", T5, words_with_end, part="encoder", note=T5_NOTE),
    text_model("umt5", T5, words_with_end, part="encoder", note=T5_NOTE),
    text_model("bart", BART, words_with_end, has_token_classifier=False, part="encoder", note=T5_NOTE),
    text_model("mbart", BART, words_with_end, has_token_classifier=False, part="encoder", note=T5_NOTE),
    text_model(
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **SPECIAL},
        decoder_only=True,
        note=LAST_NOTE,
    ),
    text_model("llama", LLAMA, decoder_only=True, note=LAST_NOTE),
    text_model("mistral", LLAMA, decoder_only=True, note=LAST_NOTE),
    text_model("qwen2", LLAMA, decoder_only=True, note=LAST_NOTE),
)
