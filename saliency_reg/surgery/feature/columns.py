"""One head with a column per task: the gradient of each task at the head's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...torch_tools import (
    Edge,
    Gradient,
    added,
    at_least_float32,
    gradients_of,
    matmul_is_reduced,
    state_dtype,
    without_autocast,
)
from .. import gramian_of, weighted_sum
from .fork import GradientFork


def tap_columns(
    made: GradientFork, output: Tensor, column_axis: int, aliases: Sequence[Edge], linear: nn.Linear | None
) -> Tensor:
    """The head's output, with a note to the fork of what gradient each column gets in the backward pass.

    Args:
        made: the fork in front of the head.
        output: what the head returned.
        column_axis: that of the tasks.
        aliases: what the head read.
        linear: the head, if it is a plain ``Linear``, for which the rest is closed form. Otherwise the head is passed
            through backwards once for each column.
    """
    tapped: Tensor = _Tap.apply(output, made, column_axis, list(aliases), linear)
    return tapped


class _Tap(torch.autograd.Function):
    # As at the fork, no tensor is saved by autograd's own means.

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, made: GradientFork, column_axis: int, aliases: list[Edge], linear: nn.Linear | None
    ) -> Tensor:
        """The output as it is."""
        ctx.set_materialize_grads(False)
        ctx.fork, ctx.column_axis, ctx.aliases = made, column_axis, aliases
        ctx.weight = None if linear is None else linear.weight.detach()
        ctx.output = output if linear is None else None
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Gradient) -> tuple[Gradient, None, None, None, None]:
        """Note the gradient of each column at the fork, and pass it on as it is."""
        if gradient is not None and ctx.fork.combiner_now() is not None:
            if ctx.weight is not None:
                ctx.fork.note_columns(_ClosedForm(gradient, ctx.weight))
            else:
                ctx.fork.note_columns(_OneByOne(ctx.output, gradient, ctx.column_axis, ctx.aliases))
        return gradient, None, None, None, None


class _ClosedForm:
    """``dL_t/dA = g_t (x) W_t`` for logits ``A W' + b`` with gradient ``g``: nothing of the size of T maps is needed."""

    def __init__(self, gradient: Tensor, weight: Tensor) -> None:
        self._shape, self._dtype = gradient.shape[:-1], gradient.dtype
        dtype = at_least_float32(gradient.dtype)
        self._gradient = gradient.flatten(0, -2).to(dtype)  # [N, T]
        self._weight = weight.to(dtype)  # [T, C]

    any_here = True

    def gramian(self) -> Tensor:
        """``[T, T]``: inner products of the task gradients."""
        dtype = state_dtype(self._gradient.device)
        gradient, weight = self._gradient, self._weight
        if matmul_is_reduced():
            gradient, weight = gradient.to(dtype), weight.to(dtype)
        with without_autocast(gradient):
            return (gradient.T @ gradient).to(dtype) * (weight @ weight.T).to(dtype)

    def weighted_sum(self, weights: Tensor, arrived: Sequence[Gradient]) -> list[Gradient]:
        """What arrived at each alias, with each task's part multiplied by its weight ``[T]``."""
        # What does not come through the columns passes, as do all gradients where there is no conflict.
        (total,) = arrived
        with without_autocast(self._gradient):
            change = (self._gradient * (weights - 1).to(self._gradient.dtype)) @ self._weight
        return [
            added(
                total,
                change.view(*self._shape, self._weight.shape[1]).to(self._dtype if total is None else total.dtype),
            )
        ]

    def per_task(self) -> list[list[Gradient]]:
        """The gradient of each task at each alias."""
        columns = [column.unsqueeze(1) * row for column, row in zip(self._gradient.unbind(1), self._weight)]
        return [[each.view(*self._shape, self._weight.shape[1]).to(self._dtype) for each in columns]]


class _OneByOne:
    """The head is passed through backwards for each column, before autograd does it for their sum."""

    def __init__(self, output: Tensor, gradient: Tensor, column_axis: int, aliases: Sequence[Edge]) -> None:
        self._gradients: list[list[Gradient]] = [[] for _ in aliases]
        for task in range(gradient.shape[column_axis]):
            seed = torch.zeros_like(gradient)
            seed.select(column_axis, task).copy_(gradient.select(column_axis, task))
            for own, one in zip(self._gradients, gradients_of([output], aliases, [seed])):
                own.append(one)

    any_here = True

    def gramian(self) -> Tensor:
        """``[T, T]``: inner products of the task gradients."""
        total = [gramian_of(own) for own in self._gradients if any(one is not None for one in own)]
        return sum(total[1:], start=total[0])

    def weighted_sum(self, weights: Tensor, arrived: Sequence[Gradient]) -> list[Gradient]:
        """What arrived at each alias, with each task's part multiplied by its weight ``[T]``."""
        # What the head returned beside the columns passes: it is what has arrived without what the columns sent.
        change = torch.cat([weights - 1, weights.new_ones(1)])
        return [
            total if all(one is None for one in own) else weighted_sum([*own, total], change)
            for own, total in zip(self._gradients, arrived)
        ]

    def per_task(self) -> list[list[Gradient]]:
        """The gradient of each task at each alias."""
        return self._gradients
