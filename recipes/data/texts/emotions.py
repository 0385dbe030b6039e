"""GoEmotions as 28 binary tasks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import DataError, OptionError
from ..hub import fingerprint_of, load_splits

HUB_ID = "google-research-datasets/go_emotions"
SUBSET = "simplified"
_NAMES = """
admiration amusement anger annoyance approval caring confusion curiosity desire disappointment disapproval
disgust embarrassment excitement fear gratitude grief joy love nervousness optimism pride realization relief
remorse sadness surprise neutral
"""
EMOTIONS = tuple(_NAMES.split())
#: In less than 1.5 % of the published training texts each.
RARE = ("desire", "embarrassment", "fear", "grief", "nervousness", "pride", "relief", "remorse")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, and their labels ``[N, T]``: 0, 1, or NaN for a missing one."""

    texts: tuple[str, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, indices: Tensor) -> LabelledTexts:
        """Some of them."""
        return LabelledTexts(tuple(self.texts[row] for row in indices.tolist()), self.labels[indices])


@dataclass(frozen=True)
class EmotionSplits:
    """Train, validation and test texts.

    Attributes:
        test_name: of the published split that the test texts are.
    """

    train: LabelledTexts
    validation: LabelledTexts
    test: LabelledTexts
    test_name: str


def emotion_splits(
    data: str, *, seed: int, train_texts: int | None, validation_texts: int | None = None, labelled: float = 1.0
) -> EmotionSplits:
    """Splits of GoEmotions.

    Where there is a test split it is the test, and validation texts are those of the validation split. Where there is none,
    the published validation split is the test, and validation texts are drawn anew for each seed from the training split.
    Either way no hyper-parameter has seen a test text.

    Args:
        data: id of a data set on the hub, or a folder of parquet files, with the columns ``text`` and ``labels``.
        seed: of the draws.
        train_texts: drawn anew for each seed; ``None`` for all.
        validation_texts: the same.
        labelled: share of the training labels that is kept, drawn at random for each text and emotion.

    Raises:
        DataError: the data cannot be read, or are others.
        OptionError: more texts than there are.
    """
    if not 0 < labelled <= 1:
        raise OptionError(f"the share of labels that is kept must be above 0 and at most 1, found {labelled}.")
    whole = _loaded(data)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(whole["train"]), generator=generator)
    if "test" in whole:
        test_name = "test"
        kept = _some(len(whole["validation"]), validation_texts, "validation", generator)
        validation = whole["validation"].rows(kept)
    else:
        test_name = "validation"
        number = 2000 if validation_texts is None else validation_texts
        if number >= len(order):
            raise OptionError(f"{number} validation texts were asked for, of {len(order)} in the training split.")
        validation, order = whole["train"].rows(order[:number]), order[number:]
    if train_texts is not None and train_texts > len(order):
        raise OptionError(
            f"{train_texts} training texts were asked for, and there are {len(order)}. Type that or less."
        )
    train = whole["train"].rows(order if train_texts is None else order[:train_texts])
    if labelled < 1:
        known = torch.rand(train.labels.shape, generator=generator) < labelled
        train = LabelledTexts(train.texts, torch.where(known, train.labels, torch.nan))
    # Texts that occur in a test split under another id would be known.
    tested = set(whole[test_name].texts)
    fresh = torch.tensor([row for row, text in enumerate(train.texts) if text not in tested])
    return EmotionSplits(train.rows(fresh), validation, whole[test_name], test_name)


@functools.lru_cache(maxsize=2)
def fingerprint(data: str) -> str:
    """Of texts and labels, to tell results on other data apart."""
    splits = _loaded(data)
    texts = [text for own in splits.values() for text in own.texts]
    return fingerprint_of(*(own.labels for own in splits.values()), texts=texts)


def _some(number: int, wanted: int | None, name: str, generator: torch.Generator) -> Tensor:
    if wanted is not None and wanted > number:
        raise OptionError(f"{wanted} {name} texts were asked for, and there are {number}. Type that or less.")
    return torch.randperm(number, generator=generator)[: number if wanted is None else wanted]


@functools.lru_cache(maxsize=2)
def _loaded(data: str) -> dict[str, LabelledTexts]:
    splits = load_splits(data, ("train", "validation"), SUBSET, optional=("test",))
    return {name: _texts_and_labels(split, data, name) for name, split in splits.items()}


def _texts_and_labels(split: Any, data: str, name: str) -> LabelledTexts:
    for needed in ("text", "labels"):
        if needed not in split.column_names:
            raise DataError(
                f"the {name} split of {data} has the columns {', '.join(split.column_names)}, expected 'text' and 'labels' "
                f"as in {HUB_ID}. Use --data {HUB_ID}, or the folder of a copy."
            )
    if len(split) == 0:
        raise DataError(f"the {name} split of {data} is empty. Choose other data.")
    rows: Sequence[Sequence[int]] = split["labels"]
    labels = torch.zeros(len(split), len(EMOTIONS))
    for row, own in enumerate(rows):
        for label in own:
            if not isinstance(label, int) or not 0 <= label < len(EMOTIONS):
                raise DataError(
                    f"row {row} of the {name} split of {data} has the label {label!r}, expected 0 to {len(EMOTIONS) - 1}. "
                    "Choose the 'simplified' GoEmotions."
                )
            labels[row, label] = 1
    return LabelledTexts(tuple(map(str, split["text"])), labels)
