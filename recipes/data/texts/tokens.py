"""Texts as token ids: a tokenizer of one's own or of an encoder, and batches that are padded to their longest text."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import DataError, need

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@functools.lru_cache(maxsize=4)
def trained_tokenizer(texts: tuple[str, ...], vocabulary: int, *, pairs: bool = False) -> Any:
    """Learn a WordPiece tokenizer, lower case, from these texts alone; for encoders that begin with random weights.

    Args:
        texts: of the training split.
        vocabulary: number of its tokens.
        pairs: mark where the one or two texts of each input begin and end, as BERT does.
    """
    tokenizers = need("tokenizers")

    def learned(size: int, first: Sequence[str]) -> dict[str, int]:
        own = tokenizers.BertWordPieceTokenizer(lowercase=True)
        own.train_from_iterator(
            texts, vocab_size=size, min_frequency=2, special_tokens=list(first), show_progress=False
        )
        vocabulary: dict[str, int] = own.get_vocab()
        return vocabulary

    # Chance numbers the letters within words, and numbers decide between tokens that are equally frequent. With letters in
    # order every process learns the same, and so does whoever goes on with a run.
    letters = sorted(token for token in learned(0, _SPECIAL) if token.startswith("##"))
    own = tokenizers.BertWordPieceTokenizer(vocab=learned(vocabulary, (*_SPECIAL, *letters)), lowercase=True)
    marks = [(token, own.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    single, pair = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1") if pairs else ("$A", "$A $B")
    own._tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single, pair, special_tokens=marks)
    names: dict[str, Any] = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL))
    if pairs:
        names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer: Any = need("transformers").PreTrainedTokenizerFast(tokenizer_object=own._tokenizer, **names)
    return tokenizer


def check_known(tokenizer: Any, ids: Iterable[Sequence[int]]) -> None:
    """Refuse a tokenizer that knows hardly a word: a folder with an encoder alone gives one without words, and no error.

    Args:
        tokenizer: of the encoder.
        ids: of each text.

    Raises:
        DataError: more than half of the words are unknown.
    """
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    words = [token for own in ids for token in own if token not in special]
    unknown = sum(token == tokenizer.unk_token_id for token in words) / max(1, len(words))
    if unknown > 0.5:
        raise DataError(
            f"{100 * unknown:.0f} % of the tokens of these texts are unknown to {type(tokenizer).__name__}, which has "
            f"{len(tokenizer)} tokens. Does the encoder's folder have the files of its tokenizer? Pass the folder or id of "
            "one that knows these texts."
        )


class TokenisedTexts:
    """Token ids and labels; a batch is ``({"input_ids": [b, L], "attention_mask": [b, L]}, labels [b, T])``.

    Args:
        tokenizer: of the encoder.
        texts: N of them.
        labels: ``[N, T]``.
        max_length: tokens that are kept of a text.

    Raises:
        DataError: from a tokenizer without a token for padding, or that knows hardly a word.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], labels: Tensor, max_length: int) -> None:
        if tokenizer.pad_token_id is None:
            raise DataError(
                f"{type(tokenizer).__name__} has no token for padding. Set tokenizer.pad_token, or choose another."
            )
        self._pad = int(tokenizer.pad_token_id)
        # One text at a time would take longer than the training of a small encoder.
        self._ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
        check_known(tokenizer, self._ids)
        self.labels = labels

    def __len__(self) -> int:
        return len(self._ids)

    def rows_as_batch(self, indices: Sequence[int], /) -> tuple[dict[str, Tensor], Tensor]:
        """The texts at these places."""
        rows = [self._ids[index] for index in indices]
        longest = max(map(len, rows), default=1)
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros(len(rows), longest, dtype=torch.long)
        for row, own in enumerate(rows):
            ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
        return {"input_ids": ids, "attention_mask": mask}, self.labels[list(indices)]
