"""Where the outputs of each task are in what the heads return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...capture import CapturedForward
from ...errors import ShapeError
from ...saliency import TaskColumns, channel_axis_by_origin, resolve_channel_axis, task_columns
from ...torch_tools import at_least_float32


class OutputLayout:
    """Of one forward: what heads return to the outputs of tasks, and slopes of these back to what heads return."""

    def __init__(self, forward: CapturedForward, tasks: Sequence[str], channel_axis: int | None) -> None:
        self._forward = forward
        self._tasks = tasks
        self.columns: TaskColumns | None = None
        if forward.columns and forward.features:
            feature = forward.features[0].tensor
            given = channel_axis_by_origin(feature, None, None) if channel_axis is None else channel_axis
            axis = resolve_channel_axis(feature.shape, given)
            self.columns = task_columns(forward.outputs[0], len(tasks), feature.shape, axis, forward.groups)
        self.present = list(forward.tasks(len(tasks)))

    def per_task(self, returned: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return ``[N]`` or ``[N, K]`` for each task that ran, in at least float32; ``returned`` has an entry per head."""
        if self.columns is not None:
            parts = {task: self.columns.part(returned[0], task) for task in self.present}
        else:
            parts = dict(zip(self.present, returned))
        return {task: self._checked(part.detach(), task) for task, part in parts.items()}

    def per_head(self, slopes: Mapping[int, Tensor], only: int | None = None) -> list[Tensor]:
        """Return the slopes in the shape and dtype of what each head returned; of ``only`` one task, zeros elsewhere."""
        outputs = self._forward.outputs
        if self.columns is None:
            return [slopes[task].to(output.dtype).view_as(output) for task, output in zip(self.present, outputs)]
        seed = torch.zeros_like(outputs[0])
        at_columns = seed.movedim(self.columns.axis, 0)
        for task in self.present if only is None else [only]:
            slope = slopes[task].to(seed.dtype)
            if self.columns.rows or slope.ndim == 1:
                slope = slope.unsqueeze(0)
            else:
                slope = slope.movedim(1, 0)
            at_columns[list(self.columns.of_task[task])] = slope.reshape(
                at_columns[list(self.columns.of_task[task])].shape
            )
        return [seed]

    def _checked(self, output: Tensor, task: int) -> Tensor:
        output = output.to(at_least_float32(output.dtype))
        rest = output.shape[1:]
        if output.ndim == 0 or rest.numel() > max(rest, default=1):
            raise ShapeError(
                f"the output of task {self._tasks[task]!r} is {list(output.shape)}, and relations are gathered of outputs "
                "[B] or [B, K]. Pool dense outputs over their positions, or leave that task's head out."
            )
        return output.flatten() if rest.numel() == 1 else output.flatten(1)
