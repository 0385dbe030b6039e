"""How the gradient of the penalty is kept from being weighed with those of the tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...capture.forward import Captured
from ...saliency.extraction import Evaluated
from .combiner import ForkSurgery
from .replay import replayed
from .saliency_gradients import SaliencyGradients

__all__ = ["kept_out_of_surgery"]


def kept_out_of_surgery(
    penalty: Tensor,
    evaluated: Evaluated,
    captured: Sequence[Captured],
    surgery: ForkSurgery,
    *,
    samples_apart: bool,
) -> Tensor:
    """The penalty, such that its gradient is added and not weighed.

    Args:
        penalty: 0-dim, with a graph.
        evaluated: the saliencies that it is made of.
        captured: the forward.
        surgery: of the fork in that forward.
        samples_apart: whether no output of one sample depends on the feature map of another.
    """
    fork, cuts = captured[0].fork, captured[0].cuts
    # Nothing is behind the fork, or the weight rows of a closed form lead around it.
    if not cuts or fork is None or evaluated.closed_form:
        return penalty
    if evaluated.unpooled and samples_apart and len(captured) == 1 and fork.watched.issuperset(evaluated.present):
        # One backward pass for the penalty and the losses, where the other way takes two through the heads.
        fork.known = SaliencyGradients(fork, evaluated.saliencies.detach(), evaluated.present, len(surgery.tasks))
        return penalty
    in_float16 = any(output.dtype == torch.float16 for one in captured for output in one.outputs)
    return replayed(penalty, cuts, surgery, in_float16)
