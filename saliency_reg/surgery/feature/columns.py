"""One head with a column per task: the gradient of each task at the head's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...capture import is_product, weight_as_now
from ...torch_tools import Edge, Gradient, added, at_least_float32, gradients_of, this_pass, without_autocast
from .. import column_gramian, weighted_sum
from .combiner import SeparateGradients, TaskGradients
from .fork import GradientFork, noted


def watch_columns(
    fork: GradientFork, output: Tensor, column_axis: int, aliases: Sequence[Edge], head: nn.Module | None
) -> Tensor:
    """Return an alias of a head's output that tells the fork, in the backward pass, what gradient each column sends it.

    ``head`` is the module, if the output is all that it returned. For a plain ``Linear`` that read one alias the gradients
    are closed form; other heads are passed through backwards once for each column.
    """
    weight = None if head is None or column_axis != output.ndim - 1 or len(aliases) != 1 else weight_as_now(head)

    def note(gradient: Gradient) -> None:
        if gradient is None or fork.combiner_now() is None:
            return
        columns: TaskGradients
        if head is not None and is_product(head, weight, output, aliases[0]):
            columns = _ClosedForm(head.get_parameter("weight").detach(), gradient)
        else:
            columns = _OneByOne(output, column_axis, aliases, fork.device, gradient)
        fork.columns = this_pass(), columns

    return noted(output, note)


class _ClosedForm:
    """``dL_t/dA = g_t (x) W_t`` for logits ``A W' + b`` with gradient ``g``: nothing of the size of T maps is needed."""

    any_here = True

    def __init__(self, weight: Tensor, gradient: Tensor) -> None:
        self._shape = *gradient.shape[:-1], weight.shape[1]
        self._dtype = gradient.dtype
        dtype = at_least_float32(gradient.dtype)
        self._gradient = gradient.flatten(0, -2).to(dtype)  # [N, T]
        self._weight = weight.to(dtype)  # [T, C]

    def gramian(self) -> Tensor:
        return column_gramian(self._gradient) * column_gramian(self._weight.T)

    def weighted_sum(self, weights: Tensor, totals: Sequence[Gradient]) -> list[Gradient]:
        # What does not come through the columns passes, as do all gradients where there is no conflict.
        (total,) = totals
        with without_autocast(self._gradient):
            change = (self._gradient * (weights - 1).to(self._gradient.dtype)) @ self._weight
        return [added(total, change.view(self._shape).to(self._dtype if total is None else total.dtype))]

    def per_task(self) -> list[list[Gradient]]:
        columns = [column.unsqueeze(1) * row for column, row in zip(self._gradient.unbind(1), self._weight)]
        return [[each.view(self._shape).to(self._dtype) for each in columns]]


class _OneByOne(SeparateGradients):
    """The head is passed through backwards for each column, before autograd does it for their sum."""

    def __init__(
        self, output: Tensor, column_axis: int, aliases: Sequence[Edge], device: torch.device, gradient: Tensor
    ) -> None:
        by_task = []
        for task in range(gradient.shape[column_axis]):
            seed = torch.zeros_like(gradient)
            seed.select(column_axis, task).copy_(gradient.select(column_axis, task))
            by_task.append(gradients_of([output], aliases, [seed]))
        super().__init__(list(zip(*by_task)), device)

    def weighted_sum(self, weights: Tensor, totals: Sequence[Gradient]) -> list[Gradient]:
        # What the head returned beside the columns passes: it is what has arrived without what the columns sent.
        change = torch.cat([weights - 1, weights.new_ones(1)])
        return [
            total if all(one is None for one in own) else weighted_sum([*own, total], change)
            for own, total in zip(self.gradients, totals)
        ]
