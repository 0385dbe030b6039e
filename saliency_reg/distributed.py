"""The few collectives, on a process group of their own. Outside distributed runs they do nothing."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks"]


class Ranks:
    """The data-parallel processes.

    A group of its own keeps these collectives apart from those of DistributedDataParallel, whose order in the backward
    pass is not known. It is made at the first use, which every process has to reach.

    Args:
        process_group: a group to use instead of a new one over all processes.
    """

    def __init__(self, process_group: Any = None) -> None:
        self._given = process_group
        self._own: Any = None
        self._made_in: Any = None

    @property
    def size(self) -> int:
        """Number of processes; 1 outside distributed runs."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self._given)

    def prepare(self) -> None:
        """Make the group, if there is one to make. To be called where all processes are."""
        if self.size > 1:
            self._group()

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, the same on each of them to the bit; in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group())
        return tensor

    def from_first(self, tensor: Tensor) -> Tensor:
        """What the first process has; in place."""
        if self.size > 1:
            group = self._group()
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
        return tensor

    def of_all(self, value: Any) -> list[Any]:
        """The values of all processes, for small Python objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group())
        return values

    def _group(self) -> Any:
        if self._given is not None:
            return self._given
        if self._own is None or self._made_in is not dist.group.WORLD:  # also after a new start of the default group
            self._own, self._made_in = dist.new_group(), dist.group.WORLD
        return self._own

    def __getstate__(self) -> dict[str, Any]:
        return {"_given": None, "_own": None, "_made_in": None}  # groups belong to their processes
