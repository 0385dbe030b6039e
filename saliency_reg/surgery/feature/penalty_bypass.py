"""How the gradient of the penalty passes the fork: it is added to those of the tasks, and not weighed with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from ...capture import CapturedForward, as_edge
from ...saliency import Saliencies
from ...torch_tools import Gradient, added, gradients_of, leaves_behind, without_autocast
from .. import column_gramian, row_sum
from .combiner import GradientCombiner, SeparateGradients
from .fork import noted
from .forked_aliases import CarriedFork, Cut

#: GradScaler comes too late for a gradient that is taken at once: small float16 numbers would be lost.
_FLOAT16_SCALE = 2.0**12


def kept_out_of_surgery(
    penalty: Tensor,
    saliencies: Saliencies,
    forward: CapturedForward,
    combiner: GradientCombiner,
    *,
    samples_apart: bool,
) -> Tensor:
    """Return the penalty, such that its gradient is added to those of the tasks and not weighed.

    It is made of the ``saliencies`` of the ``forward``. ``samples_apart`` says whether no output of a sample depends on the
    feature map of another one.
    """
    carried: CarriedFork | None = forward.carried
    # Without a fork there is nothing to pass; the weight rows of a closed form lead around it.
    if not penalty.requires_grad or carried is None or carried.fork is None or saliencies.closed_form:
        return penalty
    watched = carried.fork.watched.issuperset(saliencies.present)
    if saliencies.determine_gradients and samples_apart and len(forward.features) == 1 and watched:
        # One backward pass for the penalty and the losses, where the other way takes two through the heads.
        carried.fork.of_outputs = partial(
            _SaliencyGradients, saliencies.values.detach(), saliencies.present, len(combiner.tasks)
        )
        return penalty
    return replayed(penalty, forward, carried.cuts)


def joining_collectives(penalty: Tensor, carried: CarriedFork | None, combiner: GradientCombiner) -> Tensor:
    """Return the same value, whose backward pass joins the collective of the surgery even if no loss reaches a head here.

    ``carried`` is what the captured forward carries. Otherwise the other processes would wait for this one forever.
    """
    if combiner.ranks.size == 1 or not combiner.enabled:
        return penalty
    cuts = carried.cuts if carried is not None else []
    anchors = [cut.anchor for cut in cuts] or [torch.empty(0, device=penalty.device, requires_grad=True)]
    no_gradients = SeparateGradients([[None] * len(combiner.tasks)], penalty.device)
    at_fork = bool(cuts)  # it is visited even if nothing but None arrives there, and joins by itself

    def join(_: Gradient) -> None:
        if not at_fork and combiner.combines:
            combiner.combine(no_gradients, [None])

    return noted(penalty.clone(), join, *anchors)


def replayed(scalar: Tensor, forward: CapturedForward, cuts: Sequence[Cut]) -> Tensor:
    """Return the same value, with a graph that leads around the fork.

    Evaluating the heads a second time on the feature map would draw another dropout mask, update statistics and call
    hooks twice. So the gradient with respect to what the heads read, and to every leaf in front of that (the heads'
    parameters), is taken here from the graph there is.
    """
    edges = [edge for cut in cuts for edge in cut.edges]
    places = {as_edge(edge) for edge in edges}
    leaves = leaves_behind([scalar], places)
    factor = _FLOAT16_SCALE if any(output.dtype == torch.float16 for output in forward.outputs) else 1.0
    with _not_beyond(places), without_autocast(scalar):
        found = gradients_of([scalar], [*edges, *leaves], [torch.full_like(scalar, factor)])
    gradients = iter(found)
    pairs = [(cut.anchor, added(*[next(gradients) for _ in cut.edges])) for cut in cuts]
    pairs += zip(leaves, gradients)
    kept = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
    if not kept:
        return scalar.detach()
    inputs, known = zip(*kept)
    result: Tensor = _Replay.apply(scalar.detach(), 1 / factor, known, *inputs)
    return result


@contextmanager
def _not_beyond(places: Iterable[tuple[Node, int]]) -> Iterator[None]:
    """Let gradients arrive at these outputs of nodes, and not go on from there."""
    handles = [node.register_prehook(partial(_without, output)) for node, output in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without(output: int, gradients: tuple[Gradient, ...]) -> tuple[Gradient, ...]:
    return tuple(None if number == output else gradient for number, gradient in enumerate(gradients))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float, gradients: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Gradient, ...]:
        gradient = gradient * ctx.factor
        return None, None, None, *[gradient.to(kept.device) * kept for kept in ctx.saved_tensors]


@dataclass
class _SaliencyGradients:
    """``dL_t/dA[b] = dL_t/ds_t[b] * G_t[b]`` for heads with one output ``s_t[b]`` per sample, whose saliency is ``G_t``.

    So the gradient of the penalty need not be kept apart from those of the tasks: what arrives at the fork is their sum, and
    what the surgery changes about it is ``sum_t (w_t - 1) dL_t/dA``.
    """

    saliencies: Tensor  # [t, B, ...]
    present: list[int]  # their t tasks
    num_tasks: int  # T
    at_outputs: Mapping[int, Tensor]  # task to the gradient of its output, if that has one in this pass

    @property
    def any_here(self) -> bool:
        return bool(self.at_outputs)

    def gramian(self) -> Tensor:
        return column_gramian(self._rows.flatten(1).T)

    def weighted_sum(self, weights: Tensor, totals: Sequence[Gradient]) -> list[Gradient]:
        (total,) = totals
        change = row_sum(self._rows.flatten(1), weights - 1).view(self._rows.shape[1:])
        return [added(total, change if total is None else change.to(total.dtype))]

    def per_task(self) -> list[list[Gradient]]:
        return [[row if task in self.at_outputs else None for task, row in enumerate(self._rows)]]

    @cached_property
    def _rows(self) -> Tensor:
        """``[T, B, ...]`` task gradients, zero for a task without a loss in this pass."""
        batch_size, rest = self.saliencies.shape[1], self.saliencies.shape[2:]
        factors = self.saliencies.new_zeros(self.num_tasks, batch_size)
        for task, gradient in self.at_outputs.items():
            factors[task] = gradient.reshape(batch_size)
        factors = factors.view(self.num_tasks, batch_size, *[1] * len(rest))
        if len(self.present) == self.num_tasks:
            return self.saliencies * factors
        rows = self.saliencies.new_zeros(self.num_tasks, batch_size, *rest)
        rows[self.present] = self.saliencies
        return rows.mul_(factors)
