"""Distances of the micro-batches since the last optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..torch_tools import StateModule, real_device, version_of

#: With up to so many tasks, calls and steps of the relations deal with all pairs; with more, with those that they need.
ALL_PAIRS = 128


class PendingDistances(StateModule):
    """Combines the distances of micro-batches as if they had been one batch.

    Under the reduction ``"mean"`` distances are weighted by their number of samples, under ``"sum"`` they add up.
    """

    distances: Tensor
    samples: Tensor
    #: The tasks of which anything may be pending, with the buffer and its version then; ``None``: any may be.
    _touched: tuple[set[int], Tensor, int] | None = None
    #: What was written last when nothing was pending; ``None`` where that is not known.
    _emptied: tuple[Tensor, int] | None = None
    in_a_copy: ClassVar[dict[str, Any]] = {"_emptied": None, "_touched": None}

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
    def add(self, distances: Tensor, samples: Tensor, tasks: Sequence[int]) -> None:
        """Accumulate ``[t, t]`` distances among some tasks and the sample count behind each pair, 0 where none was seen.

        If any distance is not finite, the whole call is ignored.
        """
        distances, samples = distances.to(self.distances), samples.to(self.samples)
        finite = torch.isfinite(distances).all()
        weight = samples if self.reduction == "mean" else 1
        pending, at = self._pending_tasks(), self._at(tasks)
        self.distances[at] += torch.where(finite, distances * weight, 0.0)
        self.samples[at] += finite * samples
        self._touched = None if pending is None else (pending | set(tasks), *self._now())

    @torch.no_grad()
    def take(self) -> tuple[Tensor, Tensor, Sequence[int]]:
        """Return ``[t, t]`` distances, which of them were seen, and the tasks that they are among; and start anew."""
        pending = self._pending_tasks()
        tasks: Sequence[int] = range(len(self.samples)) if pending is None else sorted(pending)
        if pending is None and len(tasks) > ALL_PAIRS:  # a resumed run goes on with those that it had
            tasks = self.samples.any(1).nonzero().flatten().tolist()
        at = self._at(tasks)
        samples, distances = self.samples[at].clone(), self.distances[at].clone()
        if self.reduction == "mean":
            distances /= samples.clamp(min=1)
        self.distances[at] = 0
        self.samples[at] = 0
        self._emptied = self._now()
        return distances, samples > 0, tasks

    @torch.no_grad()
    def change_tasks(self, order: Sequence[int | None]) -> None:
        """Take other tasks: for each of them its index so far, ``None`` for a new one, of which nothing is pending."""
        pending, was_empty = self._pending_tasks(), not self.any
        for name in ("distances", "samples"):
            self.register_buffer(name, taken(self.get_buffer(name), order))
        self._emptied = self._now() if was_empty else None
        touched = None if pending is None else {new for new, old in enumerate(order) if old in pending}
        self._touched = None if touched is None else (touched, *self._now())

    def _pending_tasks(self) -> set[int] | None:
        if not self.any:
            return set()
        pending, buffer, version = self._touched or (None, None, -1)
        return pending if buffer is self.samples and version == version_of(self.samples) else None

    def _at(self, tasks: Sequence[int]) -> Any:
        """Return the place of some tasks in a matrix of all."""
        if len(tasks) == len(self.samples):
            return ...
        index = torch.tensor(tasks, dtype=torch.int64, device=self.samples.device)
        return index.unsqueeze(1), index

    def _now(self) -> tuple[Tensor, int]:
        return self.samples, version_of(self.samples)


def taken(values: Tensor, order: Sequence[int | None]) -> Tensor:
    """Return a vector ``[T]`` or a matrix ``[T, T]`` of tasks as one of others, with 0 for those that are new (``None``)."""
    new = [place for place, task in enumerate(order) if task is not None]
    kept = torch.tensor([task for task in order if task is not None], dtype=torch.int64, device=values.device)
    found = torch.zeros((len(order),) * values.ndim, dtype=values.dtype, device=values.device)
    place = torch.tensor(new, dtype=torch.int64, device=values.device)
    if values.ndim == 1:
        found[place] = values[kept]
    else:
        found[place.unsqueeze(1), place] = values[kept.unsqueeze(1), kept]
    return found
