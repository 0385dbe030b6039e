"""The distances of one step over all data-parallel processes, as if their batches had been one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distributed import Ranks
from .errors import ConfigurationError, TaskError
from .gramian import spread
from .state import state_dtype

__all__ = ["Brought", "Joined", "JoinedBatch"]

#: Where reading a number makes the host wait for the device, the processes compare their settings once in so many calls.
CALLS_BETWEEN_CHECKS = 50
#: Small enough that sums of squares are exact.
_FINGERPRINTS = 2**20
Configuration = Mapping[str, Any]


@dataclass(frozen=True)
class Brought:
    """What one process has to add.

    Attributes:
        present: indices of its t tasks; fewer than two have no distances.
        distances: ``[t, t]``, detached; ``None`` without any.
        samples: of its batch.
        losses: 0-dim sum of its task losses, if they were given.
    """

    present: Sequence[int]
    distances: Tensor | None
    samples: int
    losses: Tensor | None


@dataclass(frozen=True)
class Joined:
    """What all processes have together; the same on each of them to the bit, but for ``factors``.

    Attributes:
        distances: ``[T, T]`` of the joined batch: of each pair over the samples of all processes on which both heads ran;
            0 for a pair that no process has.
        samples: ``[T, T]``, how many samples these are; on the diagonal, and at most, what the head ran on.
        factors: ``[T, T]``, what this process' own distances are multiplied by, so that the mean over the processes (of the
            gradients, as DistributedDataParallel takes it) is that of the joined batch; ``None`` for a single process.
        losses: 0-dim, mean over the processes; NaN if only some gave theirs, ``None`` if this one gave none.
    """

    distances: Tensor
    samples: Tensor
    factors: Tensor | None
    losses: Tensor | None


class JoinedBatch:
    """Joins the distances of all processes by one small all-reduce in each call.

    Every process has to make every call: one whose batch lacks tasks or is empty too. A single process joins nothing.

    Args:
        num_tasks: T.
        reduction: of the distances, ``"mean"`` or ``"sum"`` over the batch.
        ranks: the processes.
    """

    def __init__(self, num_tasks: int, reduction: str, ranks: Ranks) -> None:
        self.ranks = ranks
        self._num_tasks = num_tasks
        self._reduction = reduction
        self._calls = 0

    def join(self, brought: Brought, device: torch.device, configuration: Callable[[bool], Configuration]) -> Joined:
        """Add up over the processes.

        Args:
            brought: by this process.
            device: where the collectives work.
            configuration: what has to be the same on all processes, in words; with ``True`` also what takes long to tell.

        Raises:
            TaskError, ConfigurationError: it is not; in all processes at once.
        """
        summed, own_samples = self._spread(brought, device)
        if self.ranks.size == 1:
            return Joined(summed, own_samples, None, brought.losses)
        if self._calls == 0:  # before anything whose size depends on it
            self._compare(configuration(True))
        self._calls += 1
        weight = own_samples if self._reduction == "mean" else 1
        numbers = self._numbers(brought.losses, configuration(False), own_samples)
        total = self.ranks.add(torch.cat([(summed * weight).flatten(), own_samples.flatten(), numbers]))
        pairs = own_samples.numel()
        summed, samples = total[:pairs].view_as(own_samples), total[pairs : 2 * pairs].view_as(own_samples)
        losses, with_losses, mark, squared_mark = total[2 * pairs :]
        looks = device.type == "cpu" or self._calls % CALLS_BETWEEN_CHECKS == 0
        # The variance of the marks, in whole numbers.
        if looks and int(squared_mark) * self.ranks.size != int(mark) ** 2:
            self._compare(configuration(True))
        if self._reduction == "mean":
            present = samples.clamp(min=1)
            distances, factors = summed / present, self.ranks.size * own_samples / present
        else:
            distances, factors = summed, torch.full_like(summed, self.ranks.size)
        mean_losses = None
        if brought.losses is not None:
            mean_losses = torch.where(with_losses == self.ranks.size, losses / self.ranks.size, torch.nan)
        return Joined(distances, samples, factors, mean_losses)

    def _spread(self, brought: Brought, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[T, T]`` distances and samples of this process."""
        size = self._num_tasks
        if brought.distances is None:
            nothing = torch.zeros(size, size, dtype=state_dtype(device), device=device)
            return nothing, nothing
        ran = torch.full(brought.distances.shape, float(brought.samples), dtype=state_dtype(device), device=device)
        return spread(brought.distances, brought.present, size, 0.0), spread(ran, brought.present, size, 0.0)

    @staticmethod
    def _numbers(losses: Tensor | None, configuration: Configuration, like: Tensor) -> Tensor:
        """Losses, whether there are some, and a mark of the configuration."""
        mark = zlib.crc32(repr(sorted(configuration.items())).encode()) % _FINGERPRINTS
        numbers = like.new_tensor([0.0, losses is not None, mark, mark**2])
        if losses is not None:
            numbers[0] = losses
        return numbers

    def _compare(self, configuration: Configuration) -> None:
        everywhere: list[Configuration] = self.ranks.of_all(dict(configuration))
        for what, own in configuration.items():
            values = [other.get(what) for other in everywhere]
            if any(value != own for value in values):
                raise (TaskError if what == "tasks" else ConfigurationError)(
                    f"the processes have different {what}: "
                    + ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(values))
                    + ". Build the regularizer with the same arguments on all of them, change it on all at once, and load "
                    "the same state. For a process that trains by itself type process_group='local'."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_calls": 0}  # a copy is compared anew
