"""What the regularizer saw in its latest call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .surgery_report import SurgeryReport

__all__ = ["SaliencyReport"]


@dataclass(frozen=True)
class SaliencyReport:
    """Figures of one training step. Tensors stay on their device until they are read, so keeping it costs nothing.

    In several processes all figures are those of the joined batch, the same on each of them, and in float64.

    Attributes:
        tasks: the T task names, in the order of the matrices.
        samples: ``[T]``, how many samples each head ran on in this step (of ``max_tasks_per_step``: of the chosen ones).
        strength: the factor of the penalty in this step, after warm-up.
        penalty: 0-dim, ``strength * sum_{i<j} w_ij D_ij``: what was returned, or its mean over the processes.
        losses: 0-dim, the sum of the task losses, if they were given; its mean over the processes (0 for one without heads,
            and NaN if another one gave none).
        distances: ``[T, T]``, ``D``; NaN for pairs of which a head did not run.
        relations: ``[T, T]``, the weights ``w`` that multiplied them.
        surgery: conflicts between the task gradients, once the backward pass has been; ``None`` without surgery.

    Example:
        >>> import torch
        >>> from saliency_reg import SaliencyRegularizer
        >>> regularizer = SaliencyRegularizer(None, tasks=["a", "b"], strength=0.5)
        >>> feature = torch.ones(4, 2, requires_grad=True)
        >>> outputs = {"a": feature.sum(1), "b": 3 * feature.sum(1)}
        >>> penalty = regularizer(outputs=outputs, features=feature, losses={"a": 3.0, "b": 5.0})
        >>> regularizer.report.distances
        tensor([[0., 4.],
                [4., 0.]])
        >>> regularizer.report.share
        0.25
    """

    tasks: tuple[str, ...]
    samples: Tensor
    strength: float
    penalty: Tensor
    losses: Tensor | None
    distances: Tensor
    relations: Tensor
    surgery: SurgeryReport | None = None

    @property
    def present(self) -> tuple[str, ...]:
        """The tasks whose heads ran in this step."""
        return tuple(task for task, samples in zip(self.tasks, self.samples.tolist()) if samples > 0)

    @property
    def share(self) -> float | None:
        """The penalty divided by the sum of the task losses; ``None`` where the losses were not given."""
        if self.losses is None:
            return None
        losses = abs(float(self.losses))
        if math.isnan(losses):
            return losses
        return float(self.penalty) / losses if losses > 0 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON or a tracker."""
        return {
            "tasks": list(self.tasks),
            "present": list(self.present),
            "samples": [int(samples) for samples in self.samples.tolist()],
            "strength": self.strength,
            "penalty": float(self.penalty),
            "losses": None if self.losses is None else float(self.losses),
            "share": self.share,
            "distances": self.distances.tolist(),
            "relations": self.relations.tolist(),
            "surgery": None if self.surgery is None else self.surgery.to_dict(),
        }
