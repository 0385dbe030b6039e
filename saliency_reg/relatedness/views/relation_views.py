"""The views of one training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class RelationViews:
    """Views of the relations between the tasks of one training.

    Attributes:
        tasks: their names, T of them.
        matrices: ``{view: [T, T]}``, float64 on the CPU, keys of :data:`VIEWS`, in its order; NaN where nothing is known of
            a pair (tasks whose labels were never seen together, a task that was always absent). Diagonals are those of the
            view's definition. ``tag[i, j]``: what a step along the gradient of task ``j`` does for the loss of task ``i``.
        common_labels: ``[T, T]`` int64, samples that have labels of both tasks; the diagonal counts those of each.
        trajectory: ``{view: [S, T, T]}``, the view over S parts of the training (or of the samples), from which intervals
            are made; may be empty.
        skill: ``[T]``, of each task one minus its mean loss over that of the best constant guess: 0 is chance level; NaN
            where unknown.
    """

    tasks: tuple[str, ...]
    matrices: Mapping[str, Tensor]
    common_labels: Tensor
    trajectory: Mapping[str, Tensor] = field(default_factory=dict)
    skill: Tensor | None = None
