"""The distances of one step over all data-parallel processes, as if their batches had been one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import NoHeadRanError
from ..tasks import spread
from ..torch_tools import PartlyCopied, state_dtype
from .ranks import Ranks
from .settings_check import CALLS_BETWEEN_CHECKS, Settings, compare_settings, marks_differ, marks_of


@dataclass(frozen=True)
class Brought:
    """What one process has to add.

    Attributes:
        present: indices of its t tasks.
        distances: ``[t, t]``, detached; zeros for an empty batch.
        samples: of its batch.
        losses: 0-dim sum of its task losses, if they were given.
        no_heads: why there is nothing, if no head ran here; an error if none ran in any process.
    """

    present: Sequence[int]
    distances: Tensor
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


class JoinedBatch(PartlyCopied):
    """Joins the distances of all processes by one small all-reduce in each call.

    Every process has to make every call: one whose batch lacks tasks or is empty brings zeros. So an absent task leaves no
    process waiting for another. A single process joins nothing.

    Args:
        num_tasks: T.
        reduction: of the distances, ``"mean"`` or ``"sum"`` over the batch.
        ranks: the processes.
    """

    in_a_copy: ClassVar[dict[str, Any]] = {"_calls": 0}  # a copy is compared anew

    def __init__(self, num_tasks: int, reduction: str, ranks: Ranks) -> None:
        self.ranks = ranks
        self._num_tasks = num_tasks
        self._reduction = reduction
        self._calls = 0

    def join(self, brought: Brought, relations: Tensor, settings: Callable[[bool], Settings]) -> Joined:
        """Add up over the processes.

        Args:
            brought: by this process.
            relations: ``[T, T]``, which have to be the same on all processes; on the device where the collectives work.
            settings: what else has to be the same, in words; with ``True`` also what takes long to tell.

        Raises:
            TaskError, ConfigurationError: it is not (weights up to rounding); in all processes at once.
            NoHeadRanError: no process had a head; in all of them.
        """
        summed, own_samples = self._among_all_tasks(brought, relations.device)
        if self.ranks.size == 1:
            return Joined(summed, own_samples, None, brought.losses)
        if self._calls == 0:  # before anything whose size depends on it
            compare_settings(settings(True), self.ranks)
        self._calls += 1
        parts = [
            summed * (own_samples if self._reduction == "mean" else 1),
            own_samples,
            _numbers(brought, own_samples),
            *marks_of(settings(False), relations),
        ]
        total = self.ranks.add(torch.cat([part.to(own_samples).flatten() for part in parts]))
        pairs = own_samples.numel()
        summed, samples = total[:pairs].view_as(own_samples), total[pairs : 2 * pairs].view_as(own_samples)
        losses, with_losses, without_heads, *marks = total[2 * pairs :]
        looks = relations.device.type == "cpu" or self._calls % CALLS_BETWEEN_CHECKS == 0
        if looks and marks_differ(marks, self.ranks.size):
            compare_settings(settings(True), self.ranks)
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

    def _among_all_tasks(self, brought: Brought, device: torch.device) -> tuple[Tensor, Tensor]:
        """``[T, T]`` distances and samples of this process."""
        shape = brought.distances.shape
        ran = torch.full(shape, float(brought.samples), dtype=state_dtype(device), device=device)
        distances, samples = (spread(each, brought.present, self._num_tasks, 0.0) for each in (brought.distances, ran))
        return distances, samples


def _numbers(brought: Brought, like: Tensor) -> Tensor:
    """Losses, whether there are some, and whether there are no heads."""
    no_heads = brought.no_heads is not None
    numbers = like.new_tensor([0.0, brought.losses is not None and not no_heads, no_heads])
    if brought.losses is not None:
        numbers[0] = brought.losses
    return numbers
