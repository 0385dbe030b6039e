"""One head with a column per task: the gradient of each task at the head's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...capture import is_product, weight_as_now
from ...saliency import TaskColumns
from ...torch_tools import Edge, Gradient, added, at_least_float32, gradients_of, this_pass, without_autocast
from .. import column_gramian, weighted_sum
from .combiner import SeparateGradients, TaskGradients
from .fork import GradientFork, noted


def watch_columns(
    fork: GradientFork, output: Tensor, tasks: TaskColumns, aliases: Sequence[Edge], head: nn.Module | None
) -> Tensor:
    """Return an alias of a head's output that tells the fork, in the backward pass, what gradient each column sends it.

    ``head`` is the module, if the output is all that it returned. For a plain ``Linear`` that read one alias the gradients
    are closed form; other heads are passed through backwards once for each column.
    """
    weight = None if head is None or tasks.axis != output.ndim - 1 or len(aliases) != 1 else weight_as_now(head)

    def note(gradient: Gradient) -> None:
        if gradient is None or fork.combiner_now() is None:
            return
        columns: TaskGradients
        if head is not None and is_product(head, weight, output, aliases[0]):
            columns = _ClosedForm(head.get_parameter("weight").detach(), _owners(tasks, output), gradient)
        else:
            columns = _OneByOne(output, tasks, aliases, fork.device, gradient)
        fork.columns = this_pass(), columns

    return noted(output, note)


def _owners(tasks: TaskColumns, output: Tensor) -> Tensor | None:
    """Return ``[T, columns]``, one where a column is the task's; ``None`` for one column each."""
    if tasks.single and len(tasks.of_task) == output.shape[-1]:
        return None
    owners = torch.zeros(len(tasks.of_task), output.shape[-1], device=output.device)
    for row, columns in zip(owners, tasks.of_task):
        row[list(columns)] = 1
    return owners


class _ClosedForm:
    """``dL_t/dA = g_t (x) W_t`` for logits ``A W' + b`` with gradient ``g``: nothing of the size of T maps is needed.

    Where a task has several columns, ``owners`` are ``[T, columns]``, and its gradient is the sum of theirs.
    """

    any_here = True

    def __init__(self, weight: Tensor, owners: Tensor | None, gradient: Tensor) -> None:
        self._shape = *gradient.shape[:-1], weight.shape[1]
        self._dtype = gradient.dtype
        dtype = at_least_float32(gradient.dtype)
        self._gradient = gradient.flatten(0, -2).to(dtype)  # [N, columns]
        self._weight = weight.to(dtype)  # [columns, C]
        self._owners = owners

    def gramian(self) -> Tensor:
        products = column_gramian(self._gradient) * column_gramian(self._weight.T)
        if self._owners is None:
            return products
        owners = self._owners.to(products)
        with without_autocast(products):
            return owners @ products @ owners.T

    def weighted_sum(self, weights: Tensor, totals: Sequence[Gradient]) -> list[Gradient]:
        # What does not come through the columns passes, as do all gradients where there is no conflict.
        (total,) = totals
        with without_autocast(self._gradient):
            factors = (weights - 1).to(self._gradient.dtype)
            if self._owners is not None:
                factors = factors @ self._owners.to(factors)
            change = (self._gradient * factors) @ self._weight
        return [added(total, change.view(self._shape).to(self._dtype if total is None else total.dtype))]

    def per_task(self) -> list[list[Gradient]]:
        if self._owners is None:
            columns = [column.unsqueeze(1) * row for column, row in zip(self._gradient.unbind(1), self._weight)]
        else:
            columns = [(self._gradient * own.to(self._gradient)) @ self._weight for own in self._owners]
        return [[each.view(self._shape).to(self._dtype) for each in columns]]


class _OneByOne(SeparateGradients):
    """The head is passed through backwards for each task, before autograd does it for their sum."""

    def __init__(
        self, output: Tensor, tasks: TaskColumns, aliases: Sequence[Edge], device: torch.device, gradient: Tensor
    ) -> None:
        by_task = []
        for columns in tasks.of_task:
            seed = torch.zeros_like(gradient)
            own = list(columns)
            seed.movedim(tasks.axis, 0)[own] = gradient.movedim(tasks.axis, 0)[own]
            by_task.append(gradients_of([output], aliases, [seed]))
        super().__init__(list(zip(*by_task)), device)

    def weighted_sum(self, weights: Tensor, totals: Sequence[Gradient]) -> list[Gradient]:
        # What the head returned beside the columns passes: it is what has arrived without what the columns sent.
        change = torch.cat([weights - 1, weights.new_ones(1)])
        return [
            total if all(one is None for one in own) else weighted_sum([*own, total], change)
            for own, total in zip(self.gradients, totals)
        ]
