"""A scalar whose gradient is taken at once, and handed out in the backward pass: so it does not meet the task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge

from ...capture.forward import Cut
from ...torch_tools.autograd import leaves_behind
from ...torch_tools.precision import without_autocast
from .combiner import ForkSurgery
from .fork import added

__all__ = ["replayed"]

#: GradScaler comes too late for a gradient that is taken at once: small float16 numbers would be lost.
_FLOAT16_SCALE = 2.0**12


def replayed(scalar: Tensor, cuts: Sequence[Cut], surgery: ForkSurgery, in_float16: bool) -> Tensor:
    """The same value, with a graph that leads around the fork.

    Evaluating the heads a second time on the feature map would draw another dropout mask, update statistics and call
    hooks twice. So the gradient with respect to what the heads read, and to every leaf in front of that (the heads'
    parameters), is taken here from the graph there is.

    Args:
        scalar: 0-dim, with a graph.
        cuts: where that graph ends.
        surgery: of the fork among the cuts.
        in_float16: whether a part of the graph has that format.
    """
    edges = [edge for cut in cuts for edge in cut.edges]
    leaves = leaves_behind([scalar], {edge.node for edge in edges if isinstance(edge, GradientEdge)})
    factor = _FLOAT16_SCALE if in_float16 else 1.0
    with surgery.blocking(), without_autocast(scalar):
        found = torch.autograd.grad(
            scalar,
            [*edges, *leaves],  # type: ignore[arg-type]  # edges are accepted, which older annotations do not say
            torch.full_like(scalar, factor),
            retain_graph=True,
            allow_unused=True,
        )
    gradients = iter(found)
    pairs = [(cut.anchor, added(*[next(gradients) for _ in cut.edges])) for cut in cuts]
    pairs += zip(leaves, gradients)
    kept = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
    if not kept:
        return scalar.detach()
    result: Tensor = _Replay.apply(
        scalar.detach(), 1 / factor, [gradient for _, gradient in kept], *[tensor for tensor, _ in kept]
    )
    return result


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.factor = factor
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient * ctx.factor
        return None, None, None, *[gradient.to(kept.device) * kept for kept in ctx.saved_tensors]
