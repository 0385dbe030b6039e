"""The labels of one batch, as one matrix with what is missing in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Union

import torch
from torch import Tensor

from ...errors import ShapeError, WrongTypeError
from ...tasks import per_task
from ...torch_tools import state_dtype

#: What ``update`` accepts: ``[B, T]``, or ``[B]`` for each task.
Labels = Union[Tensor, Mapping[str, Any], Sequence[Any]]
#: Marks a missing label among whole numbers.
MISSING = -100


@dataclass
class LabelBatch:
    """Labels of all tasks.

    Attributes:
        values: ``[B, T]``, float64 where the device has it; 0 where there is none.
        known: ``[B, T]``, whether there is one.
        dtypes: of each task, what was given; ``None`` for a task without labels in this batch.
    """

    values: Tensor
    known: Tensor
    dtypes: list[torch.dtype | None]

    @classmethod
    def empty(cls, tasks: int, device: torch.device) -> LabelBatch:
        """Return a batch without samples."""
        values = torch.zeros(0, tasks, dtype=state_dtype(device), device=device)
        return cls(values, values.bool(), [None] * tasks)

    def to(self, device: torch.device) -> LabelBatch:
        values, known = self.values.to(device, state_dtype(device)), self.known.to(device)
        return replace(self, values=values, known=known)

    def as_given(self, task: int) -> Tensor:
        """Return ``[B]``, the labels of a task in the dtype in which they came; 0 where there is none."""
        values = self.values[:, task]
        dtype = self.dtypes[task]
        return values if dtype is None or dtype.is_floating_point else values.to(dtype)


def labels_of(labels: Labels, tasks: Sequence[str], batch_size: int) -> LabelBatch:
    """Return the labels of a batch, on the device on which they came. NaN and, in whole numbers, -100 mean missing."""
    columns = _columns(labels, tasks)
    sizes = {tasks[task]: len(column) for task, column in columns.items()}
    if wrong := {task: size for task, size in sizes.items() if size != batch_size}:
        raise ShapeError(
            f"the forward has {batch_size} samples, and the labels have {wrong}. Call update with the labels of the batch "
            "that the model ran on, NaN (or -100 among whole numbers) where a label is missing."
        )
    devices = {column.device for column in columns.values()}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    dtype = state_dtype(device)
    values = torch.zeros(batch_size, len(tasks), dtype=dtype, device=device)
    known = torch.zeros(batch_size, len(tasks), dtype=torch.bool, device=device)
    dtypes: list[torch.dtype | None] = [None] * len(tasks)
    if isinstance(labels, Tensor):
        known = ~labels.isnan() if labels.is_floating_point() else labels != MISSING
        return LabelBatch(labels.to(dtype).masked_fill(~known, 0), known, [labels.dtype] * len(tasks))
    for task, column in columns.items():
        here = ~column.isnan() if column.is_floating_point() else column != MISSING
        known[:, task] = here.to(device)
        values[:, task] = column.to(device, dtype).masked_fill(~known[:, task], 0)
        dtypes[task] = column.dtype
    return LabelBatch(values, known, dtypes)


def _columns(labels: Labels, tasks: Sequence[str]) -> dict[int, Tensor]:
    if isinstance(labels, Tensor):
        if labels.ndim != 2 or labels.shape[1] != len(tasks):
            raise ShapeError(
                f"labels must be [B, {len(tasks)}], a column for each of the tasks {list(tasks)[:8]}, found "
                f"{list(labels.shape)}. Or pass a mapping {{task: [B]}}, which may leave tasks out."
            )
        return dict(enumerate(labels.detach().unbind(1)))
    found: dict[int, Tensor] = {}
    for task, given in per_task(labels, tasks, "labels").items():
        try:
            column = torch.as_tensor(given).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise WrongTypeError(
                f"the labels of task {tasks[task]!r} must be a tensor [B], found {type(given).__name__}."
            ) from error
        if column.ndim == 2 and column.shape[1] == 1:
            column = column.squeeze(1)
        if column.ndim != 1:
            raise ShapeError(
                f"the labels of task {tasks[task]!r} must be [B], one for each sample, found {list(column.shape)}. "
                "Of dense or one-hot labels pass one number for each sample."
            )
        if column.is_complex():
            raise WrongTypeError(f"the labels of task {tasks[task]!r} are complex, expected numbers or classes.")
        found[task] = column
    return found
