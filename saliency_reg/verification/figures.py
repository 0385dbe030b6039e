"""Rows ``share`` and ``fp16``: how large the penalty and the saliencies are."""

from __future__ import annotations

import math

import torch

from ..regularizer import LEAST_SHARE, MOST_SHARE, strength_advice
from ..torch_tools import gradients_of
from .report import Check
from .subject import SOME_STRENGTH, Subject

#: Half of the smallest float16 number: what is below becomes zero.
_VANISHES = 2.0**-25
_MOST_VANISHING = 0.01
_LOSS_SCALE = 2.0**16


def share(subject: Subject) -> Check:
    """Compare the penalty, at the strength after warm-up, with the sum of the task losses."""
    if subject.losses is None:
        return Check("share", None, "not checked", "Pass losses=, a function of what the model returns: {task: loss}.")
    strength, aim = subject.strength, subject.share
    if strength == 0 and aim is None:
        return Check("share", None, "the strength is 0: no penalty is in the loss")
    run = subject.run()
    penalty = float(subject.penalty(run).detach())
    losses = abs(sum(float(loss.detach().float().mean()) for loss in subject.losses_of(run).values()))
    if penalty == 0 or losses == 0:
        what = "penalty" if penalty == 0 else "sum of the task losses"
        return Check("share", penalty != 0, f"the {what} is 0 in this batch", _ZERO if penalty == 0 else "")
    if strength == 0 and aim is not None:
        found = aim * losses / penalty * SOME_STRENGTH
        text = f"strength='auto' is found in training; by this batch it would be {found:.2g}, for a share of {aim:g}"
        return Check("share", True, text + subject.without_loss(run))
    found = penalty / losses
    text = f"the penalty is {found:.3g} times the sum of the task losses with strength={strength:g}"
    text += subject.without_loss(run)
    passed = LEAST_SHARE <= found <= MOST_SHARE
    return Check("share", passed, text, "" if passed else strength_advice(strength / found))


_ZERO = "All heads have the same saliency (tied or equal weights), or only one has any: see the row 'saliency'."


def fp16(subject: Subject) -> Check:
    """Count what a float16 number cannot hold, of saliencies that are taken in float32."""
    forward = subject.run().forward
    device = forward.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    in_half = autocast or any(one.dtype == torch.float16 for one in [f.tensor for f in forward.features])
    wide = torch.float64 if forward.features[0].tensor.dtype == torch.float64 else torch.float32
    with subject.swapped(wide):
        run = subject.run()
        penalty = subject.penalty(run)
        edges = [edge for feature in run.forward.features for edge in feature.edges]
        gradients = gradients_of([penalty], edges) if penalty.requires_grad else ()
        again = subject.run()
        again.twin._extractor.pool = None
        values = subject.saliencies(again).values
    sizes = values.detach().abs().flatten()
    positions = max(math.prod(values.shape[3:]), 1)  # averages over them are undone before they could underflow
    sizes = sizes[sizes > 0] * 2.0 ** min(round(math.log2(positions)), 10)
    if not len(sizes):
        return Check("fp16", None, "not checked: all saliencies are zero")
    lost = float((sizes < _VANISHES).double().mean())
    text = f"{lost:.1%} of the entries of the saliencies become 0 in float16"
    arriving = [one.detach().abs().flatten() for one in gradients if one is not None]
    back = torch.cat(arriving) if arriving else sizes[:0]
    back = back[back > 0]
    if len(back):
        scale = 2.0 ** max(math.ceil(math.log2(2.0**-14 / float(back.median()))), 0)
        gone = float((back * _LOSS_SCALE < _VANISHES).double().mean())
        text += f"; so do {gone:.1%} of the penalty's gradient at a loss scale "
        text += f"of 65536 (at a loss scale of {scale:g} or more, half of its entries are as precise as "
        text += "float16 can be)"
    if lost <= _MOST_VANISHING:
        return Check("fp16", True, text)
    return Check("fp16", False if in_half else None, text, "Use bfloat16, or run the heads in float32: "
                 "torch.autocast(..., enabled=False). A loss scale does not act on the saliency itself.")  # fmt: skip
