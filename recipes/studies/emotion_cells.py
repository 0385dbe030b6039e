"""One training of the GoEmotions study: data, model and options from plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.task_kinds import BINARY
from ..data.texts.emotions import EMOTIONS, RARE, LabelledTexts, emotion_splits
from ..data.texts.tokens import TokenisedTexts
from ..models.text_encoders import EncoderTasks, small_encoder, tokenizer_of
from ..training.metrics import with_f1
from ..training.outcome import Outcome
from ..training.train import Data, train
from .cell_training import cell_options
from .study import Cell


def train_emotions(cell: Cell, data: Any, folder: Path) -> Outcome:
    """Train one cell on GoEmotions; with F1, and with rare emotions apart."""
    values = cell.setting.values
    splits = emotion_splits(
        data,
        seed=cell.seed,
        train_texts=values["train_texts"],
        validation_texts=values["validation_texts"],
        labelled=values["labelled"],
    )
    tokenizer = tokenizer_of(values["encoder"], splits.train.texts, values["vocabulary"])

    def tokenised(own: LabelledTexts) -> TokenisedTexts:
        return TokenisedTexts(tokenizer, own.texts, own.labels, values["max_length"])

    config: Any = small_encoder(
        len(tokenizer), width=values["width"], layers=values["layers"], max_length=values["max_length"]
    )
    outcome = train(
        lambda: EncoderTasks(config, EMOTIONS, (values["head_width"],), values["activation"]),
        Data(
            dict.fromkeys(EMOTIONS, BINARY),
            tokenised(splits.train),
            tokenised(splits.validation),
            tokenised(splits.test) if cell.reported else None,
        ),
        cell.method,
        cell.value,
        cell_options(cell),
        folder=folder,
        resume="auto",
    )
    if outcome.outputs:
        outcome.scores, outcome.more = with_f1(outcome.scores, outcome.outputs, outcome.validation_outputs, RARE)
    return outcome
