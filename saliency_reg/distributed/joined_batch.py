"""The distances of one step over all data-parallel processes, as if their batches had been one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import NoHeadRanError
from ..tasks import places_in, spread
from ..torch_tools import PartlyCopied, state_dtype
from .ranks import Ranks
from .settings_check import CALLS_BETWEEN_CHECKS, Settings, compare_settings, marks_differ, marks_of


@dataclass(frozen=True)
class Brought:
    """Holds what one process has to add."""

    present: Sequence[int]  # its t tasks
    distances: Tensor  # [t, t], detached; zeros for an empty batch
    samples: int | Tensor  # a tensor is 0-dim
    losses: Tensor | None  # 0-dim, the sum of its task losses, if they were given
    no_heads: NoHeadRanError | None = None  # the reason, if no head ran here; raised if none ran in any process


@dataclass(frozen=True)
class Joined:
    """Holds what all processes have together; the same on each of them to the bit, but for ``factors``."""

    #: The s tasks that the matrices are among.
    tasks: Sequence[int]
    #: ``[s, s]``, of each pair over the samples of all processes on which both heads ran; 0 if there are none.
    distances: Tensor
    #: ``[s, s]``, the number of these samples; on the diagonal, of those that each head ran on.
    samples: Tensor
    #: ``[s, s]``, multiply this process' own distances, so that the mean over the processes (of the gradients, as
    #: DistributedDataParallel takes it) is that of the joined batch; ``None`` for a single process.
    factors: Tensor | None
    #: 0-dim, mean over the processes, 0 for one without heads; NaN if another one gave none. ``None`` if this one has heads
    #: and gave none.
    losses: Tensor | None
    #: Whether a process with heads, this one or another, gave none.
    losses_missing: Tensor | bool


class JoinedBatch(PartlyCopied):
    """Joins the distances of all processes by one small all-reduce in each call.

    Every process has to make every call: one whose batch lacks tasks or is empty brings zeros. So an absent task leaves no
    process waiting for another. A single process joins nothing.
    """

    in_a_copy: ClassVar[dict[str, Any]] = {"_calls": 0}  # a copy is compared anew

    def __init__(self, reduction: str, ranks: Ranks) -> None:
        self.ranks = ranks
        self._reduction = reduction
        self._calls = 0

    def compare(self, tasks: Sequence[int], relations: Tensor, settings: Callable[[bool], Settings]) -> None:
        """Compare settings by a call that brings nothing; a difference is an error in all processes at once.

        So it is in one that makes an ordinary call meanwhile, where its settings tell, and on a CPU.
        """
        none = torch.zeros(0, 0, device=relations.device)
        self.join(Brought([], none, 0, None), tasks, relations, settings, looks=True)

    def begin_anew(self) -> None:
        """Compare all settings in the next call, as in the first one."""
        self._calls = 0

    def join(
        self,
        brought: Brought,
        tasks: Sequence[int],
        relations: Tensor,
        settings: Callable[[bool], Settings],
        *,
        looks: bool = False,
    ) -> Joined:
        """Add up over the processes; errors are raised in all of them at once.

        What was brought is of some of the ``tasks``. These, ``relations`` ``[s, s]`` among them, and ``settings`` have to be
        the same on all processes; ``settings(True)`` are all of them, ``settings(False)`` those that are told quickly. The
        collectives work on the device of the relations. ``looks``: the quick ones are compared in any case.
        """
        device = relations.device
        ran = torch.ones_like(brought.distances, dtype=state_dtype(device), device=device) * brought.samples
        present = places_in(tasks, brought.present)
        summed, own_samples = (spread(each, present, len(tasks), 0.0) for each in (brought.distances, ran))
        if self.ranks.size == 1:
            return Joined(tasks, summed, own_samples, None, brought.losses, brought.losses is None)
        if self._calls == 0:  # before anything whose size depends on it
            compare_settings(settings(True), self.ranks)
        self._calls += 1
        no_heads = brought.no_heads is not None
        parts = [
            summed * (own_samples if self._reduction == "mean" else 1),
            own_samples,
            torch.zeros((), device=device) if brought.losses is None else brought.losses,
            torch.tensor([brought.losses is not None and not no_heads, no_heads], device=device),
            *marks_of(settings(False), relations),
        ]
        total = self.ranks.add(torch.cat([part.to(own_samples).flatten() for part in parts]))
        pairs = own_samples.numel()
        summed, samples = total[: 2 * pairs].view(2, *own_samples.shape)
        losses, with_losses, without_heads, *marks = total[2 * pairs :]
        looks = looks or device.type == "cpu" or self._calls % CALLS_BETWEEN_CHECKS == 0
        if looks and marks_differ(marks, self.ranks.size):
            compare_settings(settings(True), self.ranks)
        if brought.no_heads is not None and int(without_heads) == self.ranks.size:
            raise brought.no_heads
        if self._reduction == "mean":
            counts = samples.clamp(min=1)
            distances, factors = summed / counts, self.ranks.size * own_samples / counts
        else:
            distances, factors = summed, torch.full_like(summed, self.ranks.size)
        missing = (with_losses == 0) | (with_losses + without_heads < self.ranks.size)
        mean_losses = None
        if brought.losses is not None or no_heads:
            mean_losses = torch.where(missing, torch.nan, losses / self.ranks.size)
        return Joined(tasks, distances, samples, factors, mean_losses, missing)
