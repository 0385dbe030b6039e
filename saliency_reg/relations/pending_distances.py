"""Distances of the micro-batches since the last optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_tools import StateModule


class PendingDistances(StateModule):
    """Combines the distances of micro-batches as if they had been one batch.

    Under the reduction ``"mean"`` distances are weighted by their number of samples, under ``"sum"`` they add up.
    """

    distances: Tensor
    samples: Tensor

    def __init__(self, num_tasks: int, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction
        self.register_buffer("distances", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))
        self.register_buffer("samples", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))

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
        return distances, seen
