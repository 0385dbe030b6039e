"""What gradient surgery saw in its latest backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .surgery.gramian import conflicting_share, cosines

__all__ = ["SurgeryReport"]


@dataclass(frozen=True)
class SurgeryReport:
    """Conflicts between the task gradients of one backward pass. Tensors stay on their device until they are read.

    Gradients that were multiplied by a loss scale have its square in the Gramian; everything else is free of it.

    Attributes:
        tasks: the T task names, in the order of the matrices.
        gramian: ``[T, T]``, inner products of the task gradients, over all processes; zero for a task without a gradient.
        weights: ``[T]``, what each task gradient was multiplied by; NaN for a task without a gradient.

    Example:
        >>> report = SurgeryReport.of(("a", "b", "c"), torch.tensor([[1.0, -2, 0], [-2, 4, 0], [0, 0, 0]]), torch.ones(3))
        >>> report.conflicts, report.cosines[0, 1].item(), report.weights.tolist()
        (1.0, -1.0, [1.0, 1.0, nan])
    """

    tasks: tuple[str, ...]
    gramian: Tensor
    weights: Tensor

    @classmethod
    def of(cls, tasks: tuple[str, ...], gramian: Tensor, weights: Tensor) -> SurgeryReport:
        """A report, with NaN for the weight of a task without a gradient."""
        return cls(tasks, gramian, torch.where(gramian.diagonal() == 0, torch.nan, weights))

    @property
    def cosines(self) -> Tensor:
        """``[T, T]``, cosines of the angles between the task gradients; NaN for a task without one."""
        return cosines(self.gramian)

    @property
    def conflicts(self) -> float:
        """Share of the pairs of task gradients whose product is negative, in ``[0, 1]``; NaN if there is no pair."""
        return conflicting_share(self.gramian)

    @property
    def norms(self) -> Mapping[str, float]:
        """Length of each task gradient."""
        return dict(zip(self.tasks, self.gramian.diagonal().clamp(min=0).sqrt().tolist()))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON or a tracker."""
        return {
            "tasks": list(self.tasks),
            "weights": self.weights.tolist(),
            "cosines": self.cosines.tolist(),
            "conflicts": self.conflicts,
            "norms": dict(self.norms),
        }
