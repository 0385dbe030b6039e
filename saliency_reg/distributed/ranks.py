"""The few collectives, on a process group of their own. Outside distributed runs they do nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigurationError, ShapeError, WrongTypeError
from ..torch_tools import derives_from

#: In the place of a group that a copy could not take along.
_LOST = "lost"
#: As process group: this process trains by itself, whatever the others do.
LOCAL = "local"
#: One group for each set of members (``None``: all), for all that can share one: groups are not given back.
_groups: dict[Any, Any] = {}


class Ranks:
    """Runs collectives over the data-parallel processes: those of ``process_group``, of a wrapped ``model``, or all.

    A group of its own keeps these collectives apart from those of DistributedDataParallel, whose order in the backward
    pass is not known. It is made at the first use, which every process has to reach. With ``apart`` it is shared with no
    other object: for collectives within backward passes, whose order may differ.
    """

    def __init__(self, process_group: Any = None, model: nn.Module | None = None, *, apart: bool = False) -> None:
        available = dist.is_available()
        if available and process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ConfigurationError(
                "this process is not a member of process_group. Build the regularizer on its members only, or pass each "
                f"process a group that it is in; {LOCAL!r} for one that trains by itself."
            )
        if isinstance(process_group, str):
            if process_group != LOCAL:
                raise ConfigurationError(
                    f"unknown process_group {process_group!r}. Pass a group of torch.distributed, or {LOCAL!r} for this "
                    "process alone."
                )
        elif process_group is not None and not (available and isinstance(process_group, dist.ProcessGroup)):
            raise WrongTypeError(
                f"process_group must be a group of torch.distributed (new_group(...), or mesh.get_group() of a device "
                f"mesh), found {type(process_group).__name__}."
            )
        self._given = process_group
        self._apart = apart
        self._own_groups: dict[Any, Any] = {}
        self._wrapped_in: Any = None
        self.follow(model)

    def follow(self, model: nn.Module | None) -> None:
        """Be the processes of the ``DistributedDataParallel`` around a model from now on, if none were given."""
        wrapped = derives_from(model, "DistributedDataParallel")
        self._wrapped_in = getattr(model, "process_group", None) if wrapped else None

    @property
    def size(self) -> int:
        """Return the number of processes; 1 outside distributed runs."""
        if self._given == LOCAL or not _is_running():
            return 1
        if self._given == _LOST:
            raise ConfigurationError(
                "this copy does not have the process group of the original, which cannot be copied. Build a new one with "
                "process_group=, and load the state dict."
            )
        return dist.get_world_size(self._given if self._given is not None else self._wrapped_in)

    def prepare(self) -> None:
        """Make the group, if there is one to make. All processes have to come here."""
        if self.size > 1:
            self._group()

    def add(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; the same on each of them to the bit."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group())
        return tensor

    def rows_of_all(self, rows: Tensor) -> tuple[list[Tensor], int]:
        """Return the rows ``[n_r, width]`` of all processes, in their order and detached, and which of them are these.

        Processes may have different numbers of rows, also none, and then any width: it is that of the others.

        Raises:
            ShapeError: rows of different widths; in all processes at once.
        """
        if self.size == 1:
            return [rows.detach()], 0
        group, rows = self._group(), rows.detach()
        own = torch.tensor(
            [len(rows), rows.shape[1] if len(rows) else 0, rows.dtype == torch.float64], device=rows.device
        )
        everywhere = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everywhere, own, group=group)
        counts, widths, precise = torch.stack(everywhere).T.tolist()
        width = max(widths)
        if any(count and other != width for count, other in zip(counts, widths)):
            raise ShapeError(
                f"the processes have feature maps with different numbers of channels: rows of {widths} numbers. Attach to "
                "the same model on all of them; for a process that trains by itself pass process_group='local'."
            )
        whole = torch.zeros(max(counts), width, dtype=torch.float64 if any(precise) else rows.dtype, device=rows.device)
        if len(rows):
            whole[: len(rows)] = rows
        padded = [torch.empty_like(whole) for _ in range(self.size)]
        dist.all_gather(padded, whole, group=group)
        return [other[:count] for other, count in zip(padded, counts)], dist.get_rank(group)

    def from_first(self, tensor: Tensor) -> Tensor:
        """Replace by what the first process has, in place."""
        if self.size > 1:
            group = self._group()
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
        return tensor

    def of_all(self, value: Any) -> list[Any]:
        """Return the values of all processes, for small Python objects."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group())
        return values

    def _group(self) -> Any:
        if self._given is not None:
            return self._given
        members = tuple(dist.get_process_group_ranks(self._wrapped_in)) if self._in_a_part() else None
        groups = self._own_groups if self._apart else _groups
        if groups.get("made in") is not dist.group.WORLD:  # also after a new start of the default group
            groups.clear()
            groups["made in"] = dist.group.WORLD
        if members not in groups:
            timeout = _timeout_of(self._wrapped_in or dist.group.WORLD)
            groups[members] = dist.new_group(
                None if members is None else list(members),
                timeout=timeout,
                use_local_synchronization=members is not None,  # processes that are no members may not come here
            )
        return groups[members]

    def _in_a_part(self) -> bool:
        """Tell whether the wrapped model is trained by some of the processes only."""
        return self._wrapped_in is not None and dist.get_world_size(self._wrapped_in) < dist.get_world_size()

    def __getstate__(self) -> dict[str, Any]:
        # Groups belong to their processes.
        lost = _is_running() and self._in_a_part() if self._given is None else not isinstance(self._given, str)
        given = _LOST if lost else self._given
        return {"_given": given, "_wrapped_in": None, "_apart": self._apart, "_own_groups": {}}


def _is_running() -> bool:
    return dist.is_available() and dist.is_initialized()


def _timeout_of(group: Any) -> Any:
    """Return how long its collectives wait, where that can be found out; ``None`` for torch's default."""
    for device in ("cpu", "cuda"):
        try:
            return group._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return None
