"""Figures of the latest step.

:class:`SaliencyReport` and :class:`RepMTLReport` are of a call, :class:`SurgeryReport` is of a backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .tasks import spread

#: What the matrices of a :class:`SaliencyReport` hold for tasks that had no part in the step.
_ELSEWHERE = {"samples": 0.0, "distances": math.nan, "relations": math.nan}


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
        """Build a report, with NaN for the weight of a task without a gradient."""
        return cls(tasks, gramian, torch.where(gramian.diagonal() == 0, torch.nan, weights))

    @property
    def cosines(self) -> Tensor:
        """``[T, T]``, cosines of the angles between the task gradients; NaN for a task without one."""
        norms = self.gramian.diagonal().clamp(min=0).sqrt()
        norms = torch.where(norms > 0, norms, torch.nan)
        return (self.gramian / norms / norms.unsqueeze(1)).clamp(-1, 1)

    @property
    def conflicts(self) -> float:
        """Share of the pairs of task gradients whose product is negative, in ``[0, 1]``; NaN if there is no pair."""
        row, column = torch.triu_indices(len(self.gramian), len(self.gramian), 1, device=self.gramian.device)
        norms = self.gramian.diagonal()
        counts = (norms[row] > 0) & (norms[column] > 0)
        pairs = int(counts.sum())
        return float((self.gramian[row, column][counts] < 0).sum()) / pairs if pairs else math.nan

    @property
    def norms(self) -> Mapping[str, float]:
        """Length of each task gradient."""
        return dict(zip(self.tasks, self.gramian.diagonal().clamp(min=0).sqrt().tolist()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON or a tracker."""
        return {
            "tasks": list(self.tasks),
            "weights": self.weights.tolist(),
            "cosines": self.cosines.tolist(),
            "conflicts": self.conflicts,
            "norms": dict(self.norms),
        }


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
        relations: ``[T, T]``, the weights ``w`` that multiplied them. Of more than 128 tasks NaN for tasks that had no part
            in this step; ``regularizer.relations.matrix()`` has all.
        surgery: conflicts between the task gradients, once the backward pass has been; ``None`` without surgery.

    Example:
        >>> import torch
        >>> from saliency_reg import SaliencyRegularizer
        >>> regularizer = SaliencyRegularizer(None, tasks=["a", "b"], strength=0.5, metric="l1")
        >>> feature = torch.ones(4, 2, requires_grad=True)
        >>> outputs = {"a": feature.square().sum(1), "b": 2 * feature.square().sum(1)}
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

    @classmethod
    def among(cls, some: Sequence[int], **figures: Any) -> SaliencyReport:
        """Build a report with matrices among some tasks: those of all are made when they are read."""
        if len(some) == len(figures["tasks"]):
            return cls(**figures)
        report = object.__new__(cls)
        small = {name: figures.pop(name) for name in _ELSEWHERE}
        vars(report).update(figures, _among=some, _small=small)
        return report

    def __getattr__(self, name: str) -> Tensor:
        if name not in vars(self).get("_small", ()):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        small: Tensor = vars(self)["_small"][name]
        whole = vars(self)[name] = spread(small, vars(self)["_among"], len(self.tasks), _ELSEWHERE[name])
        return whole

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
        return math.inf if losses == 0 else float(self.penalty) / losses

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON or a tracker."""
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


@dataclass(frozen=True)
class RepMTLReport:
    """Figures of one call of :class:`RepMTL`; in several processes of their joined batch, the same on each of them.

    Attributes:
        tasks: the T task names.
        samples: ``[T]``, at how many samples each task had a saliency.
        strength: what both terms were multiplied by beside their own strengths: 1 after warm-up.
        penalty: 0-dim, what was returned, or its mean over the processes.
        task_specific: 0-dim, the mean entropy of the tasks' shares, in ``[0, log T]``; ``None`` where its strength is 0.
        cross_task: 0-dim, the alignment term, which may be negative; ``None`` where its strength is 0.

    Example:
        >>> report = RepMTLReport(("a", "b"), torch.tensor([8, 8]), 1.0, torch.tensor(0.5), torch.tensor(0.6), None)
        >>> report.to_dict()["samples"]
        [8, 8]
    """

    tasks: tuple[str, ...]
    samples: Tensor
    strength: float
    penalty: Tensor
    task_specific: Tensor | None
    cross_task: Tensor | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, ready for JSON or a tracker."""
        return {
            "tasks": list(self.tasks),
            "samples": [int(samples) for samples in self.samples.tolist()],
            "strength": self.strength,
            "penalty": float(self.penalty),
            "task_specific": None if self.task_specific is None else float(self.task_specific),
            "cross_task": None if self.cross_task is None else float(self.cross_task),
        }
