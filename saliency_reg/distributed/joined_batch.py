"""The distances of one step over all data-parallel processes, as if their batches had been one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, NoHeadRanError, TaskError
from ..surgery.gramian import spread
from ..torch_tools.state import state_dtype
from .ranks import Ranks

__all__ = ["Brought", "Joined", "JoinedBatch"]

#: Where reading a number makes the host wait for the device, the processes compare their settings once in so many calls.
CALLS_BETWEEN_CHECKS = 50
#: Small enough that sums of squares are exact.
_MARKS = 2**20
Configuration = Mapping[str, Any]


@dataclass(frozen=True)
class Brought:
    """What one process has to add.

    Attributes:
        present: indices of its t tasks.
        distances: ``[t, t]``, detached; ``None`` for fewer than two tasks, or no samples.
        samples: of its batch.
        losses: 0-dim sum of its task losses, if they were given.
        no_heads: why there is nothing, if no head ran here; an error if none ran in any process.
    """

    present: Sequence[int]
    distances: Tensor | None
    samples: int
    losses: Tensor | None
    no_heads: NoHeadRanError | None = None


@dataclass(frozen=True)
class Joined:
    """What all processes have together; the same on each of them to the bit, but for ``factors``.

    Attributes:
        distances: ``[T, T]`` of the joined batch: of each pair over the samples of all processes on which both heads ran;
            0 for a pair that no process has.
        samples: ``[T, T]``, how many samples these are; on the diagonal, what each head ran on.
        factors: ``[T, T]``, what this process' own distances are multiplied by, so that the mean over the processes (of the
            gradients, as DistributedDataParallel takes it) is that of the joined batch; ``None`` for a single process.
        losses: 0-dim, mean over the processes, 0 for one without heads; NaN if another one gave none. ``None`` if this one
            has heads and gave none.
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

    def join(self, brought: Brought, relations: Tensor, configuration: Callable[[bool], Configuration]) -> Joined:
        """Add up over the processes.

        Args:
            brought: by this process.
            relations: ``[T, T]``, which have to be the same on all processes; on the device where the collectives work.
            configuration: what else has to be the same, in words; with ``True`` also what takes long to tell.

        Raises:
            TaskError, ConfigurationError: it is not (weights up to rounding); in all processes at once.
            NoHeadRanError: no process had a head; in all of them.
        """
        summed, own_samples = self._spread(brought, relations.device)
        if self.ranks.size == 1:
            return Joined(summed, own_samples, None, brought.losses)
        if self._calls == 0:  # before anything whose size depends on it
            self._compare(configuration(True))
        self._calls += 1
        weight = own_samples if self._reduction == "mean" else 1
        parts = [
            summed * weight,
            own_samples,
            self._numbers(brought, own_samples),
            *_marks(configuration(False), relations),
        ]
        total = self.ranks.add(torch.cat([part.to(own_samples).flatten() for part in parts]))
        pairs = own_samples.numel()
        summed, samples = total[:pairs].view_as(own_samples), total[pairs : 2 * pairs].view_as(own_samples)
        losses, with_losses, without_heads, *marks = total[2 * pairs :]
        if relations.device.type == "cpu" or self._calls % CALLS_BETWEEN_CHECKS == 0:
            # The variance of each mark, in whole numbers.
            sums, squares = [int(mark) for mark in marks[::2]], [int(mark) for mark in marks[1::2]]
            if any(square * self.ranks.size != mark**2 for mark, square in zip(sums, squares)):
                self._compare(configuration(True))
        if brought.no_heads is not None and int(without_heads) == self.ranks.size:
            raise brought.no_heads
        if self._reduction == "mean":
            present = samples.clamp(min=1)
            distances, factors = summed / present, self.ranks.size * own_samples / present
        else:
            distances, factors = summed, torch.full_like(summed, self.ranks.size)
        mean_losses = None
        if brought.losses is not None or brought.no_heads is not None:
            all_given = (with_losses > 0) & (with_losses + without_heads >= self.ranks.size)
            mean_losses = torch.where(all_given, losses / self.ranks.size, torch.nan)
        return Joined(distances, samples, factors, mean_losses)

    def _spread(self, brought: Brought, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[T, T]`` distances and samples of this process."""
        size, dtype = self._num_tasks, state_dtype(device)
        if brought.distances is None:
            samples = torch.zeros(size, size, dtype=dtype, device=device)
            for task in brought.present:
                samples[task, task] = brought.samples
            return torch.zeros_like(samples), samples
        ran = torch.full(brought.distances.shape, float(brought.samples), dtype=dtype, device=device)
        return spread(brought.distances, brought.present, size, 0.0), spread(ran, brought.present, size, 0.0)

    @staticmethod
    def _numbers(brought: Brought, like: Tensor) -> Tensor:
        """Losses, whether there are some, and whether there are no heads."""
        numbers = like.new_tensor([0.0, brought.losses is not None, brought.no_heads is not None])
        if brought.no_heads is not None:
            numbers[1] = 0
        if brought.losses is not None:
            numbers[0] = brought.losses
        return numbers

    def _compare(self, configuration: Configuration) -> None:
        everywhere: list[Configuration] = self.ranks.of_all(dict(configuration))
        for what, own in configuration.items():
            values = [other.get(what) for other in everywhere]
            if any(not _alike(value, own) for value in values):
                values = [_shown(value) for value in values]
                raise (TaskError if what == "tasks" else ConfigurationError)(
                    f"the processes have different {what}: "
                    + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
                    + ". Build the regularizer with the same arguments on all of them, change it on all at once, and load "
                    "the same state. For a process that trains by itself type process_group='local'."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_calls": 0}  # a copy is compared anew


def _alike(one: Any, other: Any) -> bool:
    """Equal; lists of numbers up to rounding, which may differ between kinds of processors."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(one, other))
    return bool(one == other)


def _shown(value: Any) -> str:
    return f"checksum {zlib.crc32(repr(value).encode()):08x}" if isinstance(value, list) else repr(value)


def _marks(configuration: Configuration, relations: Tensor) -> tuple[Tensor, ...]:
    """Two whole numbers that are very likely others for other settings or relations, each followed by its square."""
    of_settings = zlib.crc32(repr(sorted(configuration.items())).encode()) % _MARKS
    bits = (
        relations.contiguous().view(torch.int64 if relations.dtype == torch.float64 else torch.int32).flatten().long()
    )
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    # Computed where the relations are: nothing waits for the device.
    of_relations = ((bits % 1_000_003) * places).sum() % _MARKS
    mark = torch.tensor(of_settings, device=bits.device)
    return mark, mark**2, of_relations, of_relations**2
