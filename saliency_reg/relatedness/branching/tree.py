"""Which tasks share the columns of each stage, as numbers; and the buffers that keep it in a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...errors import StateMismatchError
from ...torch_tools import StateModule, names_from_bytes, names_to_bytes, real_device

#: The columns of one stage: the numbers of the tasks of each, ascending; columns by their first task.
Columns = list[list[int]]


def in_order(groups: Sequence[Sequence[int]]) -> Columns:
    """Return groups of tasks as columns: sorted, so that equal partitions are equal lists."""
    return sorted(sorted(group) for group in groups)


def is_finer(columns: Sequence[Sequence[int]], than: Sequence[Sequence[int]]) -> bool:
    """Tell whether each column has the tasks of one column of another partition only."""
    return all(any(set(column) <= set(other) for other in than) for column in columns)


class Tree(StateModule):
    """The columns of L stages over T tasks, as buffers: they are in the state dict, with the names that they count on.

    Attributes:
        columns: ``[L, T]`` int64: the number of the column in which a task is at a stage; stages from the input up.
    """

    columns: Tensor
    task_names: Tensor
    stage_names: Tensor

    def __init__(self, tasks: Sequence[str], stages: Sequence[str]) -> None:
        super().__init__()
        columns = torch.zeros(len(stages), len(tasks), dtype=torch.int64, device=real_device())
        self.register_buffer("columns", columns)
        self.register_buffer("task_names", names_to_bytes(tasks))
        self.register_buffer("stage_names", names_to_bytes(stages))

    def write(self, partitions: Sequence[Columns]) -> None:
        """Put the columns of all stages into the buffer."""
        rows = torch.zeros_like(self.columns, device="cpu")
        for row, columns in zip(rows, partitions):
            for number, tasks in enumerate(columns):
                row[tasks] = number
        with torch.no_grad():
            self.columns.copy_(rows)

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        for name, what in (("task_names", "tasks"), ("stage_names", "stages")):
            own, saved = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.tolist() != own.tolist():
                raise StateMismatchError(
                    f"the state dict was saved with the {what} {names_from_bytes(saved)}, but this model has "
                    f"{names_from_bytes(own)}. Build it with the same heads in the same order, backbone and cuts; nothing "
                    "was loaded."
                )
        super().check_loaded(state_dict, prefix)
        self.saved_in(state_dict, prefix)

    @staticmethod
    def saved_in(state_dict: Mapping[str, Any], prefix: str) -> list[Columns] | None:
        """Return the columns of all stages in a state dict; ``None`` if they are not in it."""
        saved = state_dict.get(f"{prefix}columns")
        if not isinstance(saved, Tensor):
            return None
        partitions = []
        for row in saved.tolist():
            groups = [[task for task, column in enumerate(row) if column == number] for number in sorted(set(row))]
            partitions.append(in_order(groups))
        if not all(is_finer(above, than=below) for below, above in pairwise(partitions)):
            raise StateMismatchError(
                f"{prefix + 'columns'!r} in the state dict is no tree: tasks that were split share a column again further "
                "up. Pass the state dict as it was saved; nothing was loaded."
            )
        return partitions
