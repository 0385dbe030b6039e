"""Under surgery in several processes: every backward pass takes part in the collective, also one that reaches no head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...capture.forward import Cut
from .combiner import ForkSurgery

__all__ = ["taking_part"]


def taking_part(penalty: Tensor, surgery: ForkSurgery, cuts: Sequence[Cut]) -> Tensor:
    """The same value, whose backward pass comes to the fork, or takes its part in the sum over the processes without one.

    Without this, a process whose losses reach no head would leave the others waiting.

    Args:
        penalty: 0-dim, with or without a graph.
        surgery: of the fork.
        cuts: of the forward; none if no head ran on this process.
    """
    if surgery.ranks.size == 1 or not surgery.enabled:
        return penalty
    anchors = [cut.anchor for cut in cuts] or [torch.empty(0, device=penalty.device, requires_grad=True)]
    result: Tensor = _TakePart.apply(surgery, bool(cuts), penalty, *anchors)
    return result


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, surgery: ForkSurgery, at_fork: bool, value: Tensor, *anchors: Tensor) -> Tensor:
        ctx.surgery, ctx.at_fork, ctx.anchors, ctx.device = surgery, at_fork, len(anchors), value.device
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # A node is visited even if nothing but None arrives, so that at a fork there is nothing to do here.
        if not ctx.at_fork and ctx.surgery.combines and not torch.is_grad_enabled():
            ctx.surgery.combine([], ctx.device)
        return None, None, gradient, *[None] * ctx.anchors
