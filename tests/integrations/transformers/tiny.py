"""Encoders so small that everything can be counted out, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor

from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel

VOCABULARY = 40
LENGTHS = (7, 4, 6)


def bert(**options: Any) -> Any:
    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
        "attn_implementation": "eager",
    }
    return transformers.BertConfig(**{**given, **options})


def distilbert() -> Any:
    options: Any = {"attn_implementation": "eager"}
    return transformers.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=16,
        n_layers=1,
        n_heads=2,
        hidden_dim=16,
        max_position_embeddings=16,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        initializer_range=0.3,
        **options,
    )


def t5() -> Any:
    return transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )


def gpt2() -> Any:
    options: Any = {"attn_implementation": "eager"}
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
        **options,
    )


def vit() -> Any:
    options: Any = {"attn_implementation": "eager"}
    return transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=0.3,
        **options,
    )


ENCODERS = {"bert": bert, "distilbert": distilbert, "t5": t5, "gpt2": gpt2}

#: Heads that share a pooled vector (the first four), or the hidden states.
HEADS: dict[str, dict[str, HeadConfig]] = {
    "mean": {
        "joy": HeadConfig(hidden=(8,), weight=0.5),
        "topic": HeadConfig(4, hidden=(6,), activation="tanh", weight=2.0),
        "tags": HeadConfig(3, problem="multi_label", hidden=(5, 4), activation="silu"),
        "age": HeadConfig(problem="regression", hidden=(4,)),
        "place": HeadConfig(2, problem="regression", hidden=(4,), weight=0.0),
    },
    "first": {
        "joy": HeadConfig(hidden=(8,), pooling="first"),
        "topic": HeadConfig(4, pooling="first", weight=3.0),
    },
    "last": {
        "joy": HeadConfig(hidden=(8,), pooling="last"),
        "topic": HeadConfig(4, hidden=(6,), pooling="last"),
        "age": HeadConfig(problem="regression", hidden=(4,), pooling="last"),
    },
    "pooler": {
        "joy": HeadConfig(hidden=(8,), pooling="pooler"),
        "topic": HeadConfig(4, hidden=(6,), pooling="pooler"),
    },
    "token": {
        "real": HeadConfig(level="token", hidden=(8,)),
        "kind": HeadConfig(5, level="token", hidden=(6,), activation="tanh", weight=1.5),
        "marks": HeadConfig(2, problem="multi_label", level="token", hidden=(4,)),
        "score": HeadConfig(problem="regression", level="token", hidden=(4,)),
        "point": HeadConfig(2, problem="regression", level="token", hidden=(4,)),
    },
    "linear token": {
        "real": HeadConfig(level="token"),
        "kind": HeadConfig(5, level="token"),
        "other": HeadConfig(level="token", problem="regression"),
    },
    "mixed": {
        "kind": HeadConfig(5, level="token", hidden=(6,)),
        "joy": HeadConfig(hidden=(8,)),
        "real": HeadConfig(level="token", hidden=(8,), weight=0.25),
        "topic": HeadConfig(4, hidden=(6,), pooling="last"),
    },
    "poolings": {
        "joy": HeadConfig(hidden=(8,), pooling="mean"),
        "topic": HeadConfig(4, hidden=(6,), pooling="first"),
        "age": HeadConfig(problem="regression", hidden=(4,), pooling="last"),
    },
}


def built(heads: Any = None, encoder: Any = None, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    heads = HEADS["mean"] if heads is None else HEADS[heads] if isinstance(heads, str) else heads
    model = MultiTaskModel.from_encoder(bert() if encoder is None else encoder, heads, **options).double()
    for name, parameter in model.heads.named_parameters():  # zeros would hide a lost one
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(lengths: tuple[int, ...] = LENGTHS, side: str = "right", seed: int = 1) -> dict[str, Tensor]:
    """Texts of different lengths, padded on one side, where the ids are of words, too."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    words = torch.randint(1, VOCABULARY, (len(lengths), longest), generator=generator)
    rows, masks, places = [], [], []
    for row, length in zip(words, lengths):
        own = row[:length]
        padding = row[length:]
        mask, place = torch.ones(length, dtype=torch.long), torch.arange(length)
        nothing = torch.zeros(longest - length, dtype=torch.long)
        in_order = (lambda *parts: parts) if side == "right" else (lambda *parts: parts[::-1])
        rows.append(torch.cat(in_order(own, padding)))
        masks.append(torch.cat(in_order(mask, nothing)))
        places.append(torch.cat(in_order(place, nothing)))
    found = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}
    return found if side == "right" else {**found, "position_ids": torch.stack(places)}


def labels(
    heads: dict[str, HeadConfig], lengths: tuple[int, ...] = LENGTHS, missing: float = 0.3, seed: int = 2
) -> dict[str, Tensor]:
    """Some are missing, those of padding among them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    found = {}
    for task, head in heads.items():
        shape = [*mask.shape] if head.level == "token" else [len(lengths)]
        if head.problem == "single_label":
            values = torch.randint(head.num_labels, shape, generator=generator)
        else:
            shape += [head.num_labels] if head.num_labels > 1 else []
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            values = values if head.problem == "regression" else (values > 0).double()
        gone = torch.rand(shape, generator=generator) < missing
        gone.view(-1)[0] = False  # at least one is known
        if head.level == "token":
            gone |= ~(mask if gone.ndim == 2 else mask[..., None])
        own = values.masked_fill(gone, -100)
        if own.is_floating_point():  # half of them NaN
            own = own.masked_fill(gone & (torch.rand(shape, generator=generator) < 0.5), float("nan"))
        found[task] = own
    return found


def tokenizer(**options: Any) -> Any:
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{index}": index for index in range(2, VOCABULARY)}}
    plain = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", **options)
