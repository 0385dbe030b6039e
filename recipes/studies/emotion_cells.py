"""One cell of the GoEmotions study: data, model and training from plain values."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import dataclasses
from typing import Any

from ..data.task_kinds import BINARY
from ..data.texts.emotions import EMOTIONS, RARE, LabelledTexts, emotion_splits, fingerprint
from ..data.texts.tokens import TokenisedTexts
from ..models.text_encoders import EncoderTasks, small_encoder, tokenizer_of
from ..training.f1 import with_f1
from ..training.train import Data, Outcome, train_tasks
from .cell_training import CellTraining, options_of
from .study import Cell

__all__ = ["EmotionCell", "EmotionOutcome"]


@dataclasses.dataclass
class EmotionOutcome(Outcome):
    """With F1, and with rare emotions apart."""

    more: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def macro(self) -> dict[str, float]:
        """Means over the tasks."""
        return {**super().macro, **self.more}


class EmotionCell(CellTraining):
    """Trains cells on GoEmotions."""

    def fingerprint(self, cell: Cell) -> str:  # noqa: ARG002  # all cells have the same data
        return fingerprint(self.data)

    def train(self, cell: Cell) -> Outcome:
        values = cell.setting.values
        splits = emotion_splits(
            self.data,
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
        outcome = train_tasks(
            lambda: EncoderTasks(config, EMOTIONS, (values["head_width"],), values["activation"]),
            Data(
                dict.fromkeys(EMOTIONS, BINARY),
                tokenised(splits.train),
                tokenised(splits.validation),
                tokenised(splits.test) if cell.reported else None,
            ),
            cell.method,
            cell.value,
            options_of(cell, warmup_steps=values["warmup_steps"]),
            cell.seed,
        )
        found = EmotionOutcome(**vars(outcome))
        if outcome.outputs:
            found.scores, found.more = with_f1(outcome.scores, outcome.outputs, outcome.validation_outputs, RARE)
        return found
