"""The outputs of all tasks in one tensor: where each task has its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..capture import ColumnGroups
from ..errors import ShapeError, TaskError
from .scalars import class_axis


@dataclass
class TaskColumns:
    """Which entries of one axis of a head's output belong to each task."""

    axis: int
    of_task: Sequence[Sequence[int]]
    rows: bool  # the axis is that of the tasks, [B, T, K], and each has a row of it

    @property
    def single(self) -> bool:
        """Whether it is ``[B, ..., T]`` with one column per task."""
        return not self.rows and all(columns == range(task, task + 1) for task, columns in enumerate(self.of_task))

    def part(self, output: Tensor, task: int) -> Tensor:
        """Return what belongs to a task; a view, unless its columns are here and there."""
        columns = self.of_task[task]
        if isinstance(columns, range) and columns.step == 1:
            found = output.narrow(self.axis, columns[0], len(columns))
        else:
            found = output.movedim(self.axis, 0)[list(columns)].movedim(0, self.axis)
        return found.squeeze(self.axis) if self.rows else found


def task_columns(
    output: Tensor, num_tasks: int, feature_shape: Sequence[int], channel_axis: int, groups: ColumnGroups | None
) -> TaskColumns:
    """Find the axis of a head's output that has the columns of all tasks, one each unless there are ``groups``."""
    if output.ndim < 2:
        raise ShapeError(f"the head's output must be [B, {num_tasks}], found {list(output.shape)}.")
    rows, axis = _is_of_rows(output, num_tasks, feature_shape, channel_axis), 1
    if not rows:
        axis = class_axis(output, "all tasks", feature_shape, channel_axis)  # type: ignore[arg-type]  # any shape
    width = output.shape[axis]
    if groups is not None:
        of_task = groups.of(width)
        if rows and any(len(columns) > 1 for columns in of_task):
            raise TaskError(
                f"the head's output, shape {list(output.shape)}, has a row for each task: columns= must give each task one "
                "number of axis 1, or be left out for tasks=[...]."
            )
        return TaskColumns(axis, of_task, rows)
    if width != num_tasks:
        raise TaskError(
            f"the head's output, shape {list(output.shape)}, has {width} columns for {num_tasks} tasks. Name each column "
            "once in tasks=, or pass columns={'colour': slice(0, 4), ...} where a task has several."
        )
    return TaskColumns(axis, [range(task, task + 1) for task in range(num_tasks)], rows)


def _is_of_rows(output: Tensor, num_tasks: int, feature_shape: Sequence[int], channel_axis: int) -> bool:
    """Whether it is ``[B, T, K]`` or ``[B, T, K, H, W]``: a row of K classes for each task."""
    if output.ndim == 3:
        if len(feature_shape) != 3:
            return True
        return channel_axis != 1 and output.shape[1] != feature_shape[1] and output.shape[1] == num_tasks
    return output.ndim == 5 and len(feature_shape) == 4 and output.shape[1] == num_tasks
