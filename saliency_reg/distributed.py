"""The few collectives, on a process group of their own. Outside distributed runs they do nothing."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .errors import ConfigurationError, WrongTypeError

__all__ = ["LOCAL", "Ranks"]

#: As process group: this process trains by itself, whatever the others do.
LOCAL = "local"


class Ranks:
    """The data-parallel processes.

    A group of its own keeps these collectives apart from those of DistributedDataParallel, whose order in the backward
    pass is not known. It is made at the first use, which every process has to reach.

    Args:
        process_group: a group to use instead of a new one, or ``"local"`` for this process alone.
        model: without a group given, the new one has the processes of a ``DistributedDataParallel`` around the model, or
            all there are.

    Raises:
        ConfigurationError: another text.
        WrongTypeError: no process group.
    """

    def __init__(self, process_group: Any = None, model: nn.Module | None = None) -> None:
        if isinstance(process_group, str) and process_group != LOCAL:
            raise ConfigurationError(
                f"unknown process_group {process_group!r}. Pass a group of torch.distributed, or {LOCAL!r} for this process "
                "alone."
            )
        if not (process_group is None or isinstance(process_group, str) or _is_group(process_group)):
            raise WrongTypeError(
                f"process_group must be a group of torch.distributed (new_group(...), or mesh.get_group() of a device "
                f"mesh), found {type(process_group).__name__}."
            )
        self._given = process_group
        self._wrapped_in: Any = getattr(model, "process_group", None) if _is_wrapped(model) else None
        self._own: Any = None
        self._made_in: Any = None

    @property
    def size(self) -> int:
        """Number of processes; 1 outside distributed runs."""
        if self._given == LOCAL or not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self._given if self._given is not None else self._wrapped_in)

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return 0 if self.size == 1 else dist.get_rank(self._group())

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
            if self._wrapped_in is None or dist.get_world_size(self._wrapped_in) == dist.get_world_size():
                self._own = dist.new_group()
            else:
                # The other processes may not come here.
                members = dist.get_process_group_ranks(self._wrapped_in)
                self._own = dist.new_group(members, use_local_synchronization=True)
            self._made_in = dist.group.WORLD
        return self._own

    def __getstate__(self) -> dict[str, Any]:
        # Groups belong to their processes.
        given = LOCAL if self._given == LOCAL else None
        return {"_given": given, "_wrapped_in": None, "_own": None, "_made_in": None}


def _is_wrapped(model: nn.Module | None) -> bool:
    return any(kind.__name__ == "DistributedDataParallel" for kind in type(model).__mro__)


def _is_group(value: Any) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)
