"""Task gradients at the feature map from saliencies that are there already."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor

from ..gramian import row_gramian, row_sum
from .fork import Fork, Gradient, added

__all__ = ["SaliencyGradients"]


class SaliencyGradients:
    """``dL_t/dA[b] = dL_t/ds_t[b] * G_t[b]`` for heads with one output ``s_t[b]`` per sample, whose saliency is ``G_t``.

    So the gradient of the penalty need not be kept apart from those of the tasks: what arrives at the fork is their sum, and
    what the surgery changes about it is ``sum_t (w_t - 1) dL_t/dA``.

    Args:
        made: the fork, which watches the outputs of these heads.
        saliencies: ``[t, B, ...]`` of the tasks in ``present``, detached.
        present: task indices.
        num_tasks: T.
    """

    def __init__(self, made: Fork, saliencies: Tensor, present: Sequence[int], num_tasks: int) -> None:
        self._fork = weakref.ref(made)  # which holds on to this
        self._saliencies = saliencies
        self._row_of = {task: row for row, task in enumerate(present)}
        self._num_tasks = num_tasks
        self._rows: Tensor | None = None

    @property
    def any_here(self) -> bool:
        """Whether an output has a gradient in this backward pass."""
        return bool(self._at_outputs())

    def gramian(self) -> Tensor:
        """``[T, T]`` inner products."""
        self._rows = self._task_rows()
        return row_gramian(self._rows.flatten(1))

    def weighted_sum(self, weights: Tensor, arrived: Sequence[Gradient]) -> list[Gradient]:
        """What arrived, changed by the weights."""
        rows, self._rows = self._task_rows() if self._rows is None else self._rows, None
        (total,) = arrived
        change = row_sum(rows.flatten(1), weights - 1).view(rows.shape[1:])
        return [added(total, change if total is None else change.to(total.dtype))]

    def per_task(self) -> list[list[Gradient]]:
        """``[1][task]``."""
        here = self._at_outputs()
        rows = self._task_rows()
        return [[rows[task] if task in here else None for task in range(self._num_tasks)]]

    def _at_outputs(self) -> dict[int, Tensor]:
        made = self._fork()
        return {} if made is None else made.at_outputs()

    def _task_rows(self) -> Tensor:
        """``[T, B, ...]`` task gradients, zero for a task without a loss in this pass."""
        saliencies = self._saliencies
        batch_size = saliencies.shape[1]
        factors = saliencies.new_zeros(self._num_tasks, batch_size)
        for task, gradient in self._at_outputs().items():
            factors[task] = gradient.reshape(batch_size)
        shape = (self._num_tasks, batch_size, *[1] * (saliencies.ndim - 2))
        if len(self._row_of) == self._num_tasks:
            return saliencies * factors.view(shape)
        rows = saliencies.new_zeros(self._num_tasks, *saliencies.shape[1:])
        rows[list(self._row_of)] = saliencies
        return rows.mul_(factors.view(shape))
