"""Distances of the micro-batches since the last optimizer step."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..torch_tools import StateModule, real_device, version_of


class PendingDistances(StateModule):
    """Combines the distances of micro-batches as if they had been one batch.

    Under the reduction ``"mean"`` distances are weighted by their number of samples, under ``"sum"`` they add up.
    """

    distances: Tensor
    samples: Tensor
    #: What was written last when nothing was pending; ``None`` where that is not known.
    _emptied: tuple[Tensor, int] | None = None
    in_a_copy: ClassVar[dict[str, Any]] = {"_emptied": None}

    def __init__(self, num_tasks: int, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction
        for name in ("distances", "samples"):
            zeros = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=real_device())
            self.register_buffer(name, zeros)
        self._emptied = self._now()

    @property
    def any(self) -> bool:
        """Whether there may be some: anything was written since they were taken. A device is not waited for."""
        buffer, version = self._emptied or (None, -1)
        return buffer is not self.samples or version != version_of(self.samples)

    @torch.no_grad()
    def add(self, distances: Tensor, samples: Tensor) -> None:
        """Accumulate ``[T, T]`` distances and the sample count behind each pair, 0 where none was seen.

        If any distance is not finite, the whole call is ignored.
        """
        distances, samples = distances.to(self.distances), samples.to(self.samples)
        finite = torch.isfinite(distances).all()
        weight = samples if self.reduction == "mean" else 1
        self.distances += torch.where(finite, distances * weight, 0.0)
        self.samples += finite * samples

    @torch.no_grad()
    def take(self) -> tuple[Tensor, Tensor]:
        """Return ``[T, T]`` distances and which of them were seen, and start anew."""
        seen = self.samples > 0
        distances = self.distances.clone()
        if self.reduction == "mean":
            distances /= self.samples.clamp(min=1)
        self.distances.zero_()
        self.samples.zero_()
        self._emptied = self._now()
        return distances, seen

    def _now(self) -> tuple[Tensor, int]:
        return self.samples, version_of(self.samples)
