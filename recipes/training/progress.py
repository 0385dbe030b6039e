"""How a training goes: its curves, and the best weights so far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..methods.backward import Backward
from .best_weights import BestWeights


class Progress:
    """The curves so far, and the best weights: those of the highest score, for each independent part of the model.

    Not of the lowest loss: that comes early where a method grows overconfident, before all tasks have learned to say yes,
    and compares how well methods are calibrated rather than how well they tell classes apart. Ties go to the loss.
    """

    def __init__(self, model: Any, tasks: tuple[str, ...]) -> None:
        parts = model.parts() if hasattr(model, "parts") else [(tasks, model)]
        self.tasks_of_parts = [list(own) for own, _ in parts]
        self._parts = [module for _, module in parts]
        self.begin_again()
        self.curves: dict[str, list[float]] = {}
        self.relations: list[list[float]] | None = None

    def begin_again(self) -> None:
        """Forget the best weights so far, which are those of a model with other parameters."""
        # A training that diverges at once has the weights of now, as epoch 0.
        self.best = BestWeights(self._parts, (-math.inf, -math.inf))

    def update(self, figures: Mapping[str, float], of_parts: Sequence[tuple[float, float]], backward: Backward) -> None:
        for name, value in figures.items():
            self.curves.setdefault(name, []).append(value)
        if self.best.update(int(figures["epoch"]), of_parts) or self.relations is None:
            self.relations = backward.relations

    def epochs_of_tasks(self) -> dict[str, int]:
        return {task: epoch for tasks, epoch in zip(self.tasks_of_parts, self.best.epochs) for task in tasks}

    def means(self) -> tuple[float, float]:
        """Score and loss, mean over the tasks; those whose labels allow no score are left out of it."""
        known = list(zip(map(len, self.tasks_of_parts), self.best.scores))
        # A part that diverged has no loss, either, and counts.
        scored = [(size, score) for size, (score, loss) in known if score > -math.inf or loss == -math.inf]
        score = sum(size * score for size, score in scored) / sum(size for size, _ in scored) if scored else -math.inf
        return score, sum(-size * loss for size, (_, loss) in known) / sum(size for size, _ in known)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best.state_dict(), "curves": self.curves, "relations": self.relations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best.load_state_dict(state["best"])
        self.curves = {name: list(curve) for name, curve in state["curves"].items()}
        self.relations = state["relations"]
