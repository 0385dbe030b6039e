"""What a training leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from saliency_reg import RelationViews

from .metrics import macro


@dataclass
class Outcome:
    """What a training left, as plain numbers beside the model.

    Attributes:
        model: with the best weights by validation.
        best_epochs: of each task, when it had them; 0 for its initial weights.
        validation: what it was chosen by: the mean over the tasks of AUC, accuracy, or one minus the nMSE.
        validation_loss: mean over the tasks, at the same epochs.
        scores: on the test split, of each task; empty without one.
        curves: one value for each look at the validation split.
        relations: ``[T, T]``, of the best epoch, if the method has any.
        outputs, validation_outputs: logits ``"outputs"`` and ``"labels"``, if the test split was looked at.
        more: macro figures beside the means over the tasks.
        costs: ``"seconds_per_step"`` and ``"peak_memory"`` (bytes), if the options measure them.
        views: of the relations between the tasks, if the options watch them.
    """

    model: nn.Module
    best_epochs: dict[str, int]
    validation: float
    validation_loss: float
    scores: dict[str, dict[str, float]]
    curves: dict[str, list[float]]
    relations: list[list[float]] | None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    validation_outputs: dict[str, Tensor] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    views: RelationViews | None = None

    @property
    def macro(self) -> dict[str, float]:
        """Means over the tasks."""
        return {**macro(self.scores), **self.more}

    @property
    def best_epoch(self) -> int:
        """That of the part of the model that was last at its best; most models have one part."""
        return max(self.best_epochs.values())

    def to_dict(self) -> dict[str, Any]:
        """What goes into a file."""
        names = ("best_epochs", "validation", "validation_loss", "macro", "scores", "curves", "relations")
        return {name: getattr(self, name) for name in names}
