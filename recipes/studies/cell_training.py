"""From a cell of a study to its result."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ..training.train import Options, Outcome
from .results_file import timed
from .study import Cell

__all__ = ["CellTraining", "options_of"]


@dataclass(frozen=True)
class CellTraining(ABC):
    """Trains cells in any process.

    Attributes:
        data: folder or hub id.
        deadline: of ``time.time()``, after which no training begins.
    """

    data: str
    deadline: float | None = None

    def __call__(self, cell: Cell) -> tuple[Cell, dict[str, Any] | None, dict[str, Any]]:
        """The cell, its result (``None`` after the deadline), and what else should be known about it."""
        if self.deadline is not None and time.time() > self.deadline:
            return cell, None, {}
        with timed(self.fingerprint(cell)) as about:
            outcome = self.train(cell)
        return cell, outcome.to_dict(), about

    @abstractmethod
    def fingerprint(self, cell: Cell) -> str:
        """Of the data that the cell is trained on."""

    @abstractmethod
    def train(self, cell: Cell) -> Outcome:
        """One training; only a reported one may see the test split."""


def options_of(cell: Cell, **more: Any) -> Options:
    """The options of a cell's training that its setting names, on which its numbers depend.

    Args:
        cell: of which.
        more: options on which they depend up to rounding alone.
    """
    values = cell.setting.values
    return Options(
        epochs=values["epochs"],
        batch_size=values["batch_size"],
        learning_rate=values["learning_rate"],
        weight_decay=values["weight_decay"],
        evaluations=values["evaluations"],
        temperature=values.get("temperature"),
        **more,
    )
