"""From losses of single samples to means over the labels of a whole step or epoch, in all processes."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..runtime.processes import Ranks
from .objective import TaskLosses


class LossSums:
    """Sums of weighted losses of this process on the device, and the labels of all processes on the host."""

    def __init__(self, tasks: Sequence[str], device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(tasks), dtype=dtype, device=device)
        self._counts = torch.zeros(len(tasks), dtype=torch.float64)

    def add(self, sums: Tensor | list[Tensor]) -> None:
        stacked = sums if isinstance(sums, Tensor) else torch.stack(sums)
        self._sums += stacked.detach()

    def count(self, counts: Tensor) -> None:
        self._counts += counts

    def take_means(self, ranks: Ranks) -> list[float]:
        """``[T]`` mean losses over all processes, NaN for a task without labels; and begin anew."""
        sums = ranks.total(self._sums.to("cpu", torch.float64, copy=True))
        means: list[float] = (sums / self._counts).tolist()
        self._sums.zero_()
        self._counts.zero_()
        return means

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self._sums.cpu().clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._sums.copy_(state["sums"])
        self._counts.copy_(state["counts"])

    @staticmethod
    def joined(states: Sequence[Mapping[str, Tensor]], only_counts: bool) -> dict[str, Tensor]:
        """The state of one process that has the sums of all, or of one beside it."""
        sums = torch.stack([state["sums"] for state in states]).sum(0)
        return {"sums": torch.zeros_like(sums) if only_counts else sums, "counts": states[0]["counts"]}


def weighted_sums(losses: TaskLosses, weights: Tensor | None) -> Tensor | list[Tensor]:
    """``[T]``, or T 0-dim tensors whose graphs stay apart."""
    if isinstance(losses, Tensor):
        return losses.sum(1) if weights is None else (losses * weights.to(losses)).sum(1)
    if weights is None:
        return [loss.sum() for loss in losses]
    return [(loss * weight.to(loss)).sum() for loss, weight in zip(losses, weights)]


def scaled(sums: Tensor | list[Tensor], factors: list[float]) -> Tensor | list[Tensor]:
    if isinstance(sums, Tensor):
        return sums * torch.tensor(factors, dtype=sums.dtype, device=sums.device)
    return [own * factor for own, factor in zip(sums, factors)]
