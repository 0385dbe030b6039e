"""Rows ``reach`` and ``derivatives``: where the gradient of the penalty arrives, and whether it is the derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..regularizer import HeadForm
from ..saliency import batch_first, custom_functions
from ..tasks import first_few
from ..torch_tools import gradients_of
from .culprits import (
    Part,
    behind_the_feature,
    changed_in_place,
    detached_parts,
    heads_without_backbone,
    parts_without_derivative,
    patched,
    watched_run,
)
from .report import Check
from .saliency_checks import handed, maps_of
from .subject import HeldStatistics, Run, Subject

#: Relative to what is moved. A kink may lie in a large step, and a layer that computes in float32 drowns a small one.
_STEPS = {torch.float64: (1e-5, 1e-3, 1e-7), torch.float32: (1e-2, 3e-3, 3e-2)}


def reach(subject: Subject) -> Check:
    """Take the gradient of the penalty with respect to all parameters."""
    run, parts = watched_run(subject)
    try:
        return _detached(subject, run, parts) or _reach_of(subject, run)
    except RuntimeError as error:
        changed = changed_in_place(parts) if "inplace" in str(error) or "in place" in str(error) else []
        if not changed:
            raise
        text = f"changed in place after it was returned, but needed for a gradient: {_names(changed)}"
        return Check("reach", False, text, "Use the operation that makes a new tensor: x = x + y, not x += y.")


def _detached(subject: Subject, run: Run, parts: list[Part]) -> Check | None:
    if found := detached_parts(run, parts):
        text = f"the outputs do not depend on these parts, which ran and can be trained: {_names(found)}"
        return Check("reach", False, text, f"{_DETACHED} them and the outputs.")
    if found := heads_without_backbone(run, [one for _, one in _trained(subject)[1]]):
        text = f"heads read what is detached from the backbone: {[subject.heads.names[index] for index in found]}"
        return Check("reach", False, text, f"{_DETACHED} the backbone and these heads.")
    return None


def _reach_of(subject: Subject, run: Run) -> Check:
    penalty = subject.penalty(run)
    if not penalty.requires_grad:
        return Check("reach", False, "the penalty has a value and no gradient: it trains nothing", _TRAIN_HEADS)
    backbone = [one for _, one in _trained(subject)[1]]
    if not backbone:
        return Check(
            "reach", None, "it trains the heads: no parameter outside of them can be trained (frozen, or none)"
        )
    found = [one for one in gradients_of([penalty], backbone) if one is not None and bool(one.any())]
    if found:
        size = sum(float(one.double().square().sum()) for one in found) ** 0.5
        text = f"yes: {len(found)} of {len(backbone)} parameters outside of the heads, length {size:.2g}"
        return Check("reach", True, text)
    if bool(penalty.detach() == 0):
        return Check("reach", None, "not known: the penalty is 0 in this batch (all saliencies are equal)")
    if run.twin._reach.reaches is False and run.twin._reach.form is not HeadForm.SMOOTH:
        return Check(
            "reach",
            None,
            "no, it trains the heads only: their saliency is locally constant (piecewise linear)",
            _SMOOTH,
        )
    text = f"no gradient arrives at the {len(backbone)} parameters outside of the heads"
    return Check("reach", False, text, f"{_DETACHED} them and the heads.")


def _trained(subject: Subject) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """Return the trained parameters of the heads, and the others."""
    in_heads = {id(one) for head in subject.heads.modules for one in head.parameters()}
    named = [(name, one) for name, one in subject.model.named_parameters() if one.requires_grad]
    return [pair for pair in named if id(pair[1]) in in_heads], [pair for pair in named if id(pair[1]) not in in_heads]


def _names(parts: list[Part]) -> str:
    return first_few([str(part) for part in parts])


_DETACHED = "Look for .detach(), .data, .item() or no_grad between"
_SMOOTH = "Use a smooth activation such as GELU in the heads, or target='loss', if it is to reach the backbone."
_TRAIN_HEADS = "Train the heads (they are frozen, or their backward detaches), or use a smooth activation in them."


def derivatives(subject: Subject, tolerance: float | None) -> Check:
    """Compare with finite differences: the saliency along the feature map, and the penalty's gradient along parameters."""
    run, parts = watched_run(subject)
    subject.penalty(run)  # raises where torch knows that something cannot be differentiated twice
    wrong, dtype = subject.in_double(lambda: _compared(subject, tolerance))
    if not wrong:
        text = f"finite differences agree with the saliency and with the penalty's gradient ({str(dtype)[6:]})"
        return Check("derivatives", True, text)
    run = subject.run()
    found = parts_without_derivative(subject, parts)
    words = [f"{kind}: {_names(guilty)}" for kind, guilty in found.items()]
    edges = [edge for feature in run.forward.features for edge in feature.edges]
    if functions := custom_functions(run.forward.outputs, edges):
        words.append(f"autograd functions on the way: {', '.join(functions)}")
    if changed := [] if found else patched(behind_the_feature(subject, parts)):
        words.append(f"parts with a forward of their own: {_names(changed)}")
    where = f" ({'; '.join(words)})" if words else ""
    return Check("derivatives", False, f"{' and '.join(wrong)}{where}", _ADVICE)


_ADVICE = (
    "Move what is meant (reversal, scaling, straight-through) in front of the feature map; otherwise save inputs by "
    "ctx.save_for_backward and compute in backward with torch operations."
)


def _compared(subject: Subject, tolerance: float | None) -> tuple[list[str], torch.dtype]:
    """Return what is not as it should be, in words, and the number format in which that was found out."""
    wrong = []
    dtype = subject.run().forward.features[0].tensor.dtype
    used = torch.float64 if dtype == torch.float64 else torch.float32
    steps, allowed = _STEPS[used], tolerance or (1e-2 if used == torch.float64 else 5e-2)
    if subject.replaceable and not _agree(_Outputs(subject), steps, allowed):
        wrong.append("the saliency is not the derivative of the outputs")
    for words, own in zip(("the heads", "the other parts"), _trained(subject)):
        if own and not _agree(_OfPenalty(subject, [one for _, one in own]), steps, allowed):
            wrong.append(f"a part of the penalty's gradient is missing at the parameters of {words}")
    return wrong, dtype


class _Function:
    """A number, as a function of tensors; ``floor`` is how large a difference means nothing."""

    start: Sequence[Tensor]

    def slope(self, directions: Sequence[Tensor]) -> tuple[float, float]:
        """Return the derivative along the directions as autograd has it, and the floor, relative to a step of 1."""
        raise NotImplementedError

    def at(self, step: float, directions: Sequence[Tensor]) -> float:
        raise NotImplementedError


def _agree(function: _Function, steps: Sequence[float], allowed: float) -> bool:
    for number, step in enumerate(steps):
        generator = torch.Generator().manual_seed(number)
        directions = [_direction(one, generator) for one in function.start]
        expected, floor = function.slope(directions)
        measured = (function.at(step, directions) - function.at(-step, directions)) / (2 * step)
        if abs(measured - expected) <= allowed * max(abs(measured), abs(expected)) + floor:
            return True
    return False


def _direction(tensor: Tensor, generator: torch.Generator) -> Tensor:
    scale = float(tensor.detach().double().square().mean().sqrt()) or 1.0
    random = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return (scale * random).to(tensor.device, tensor.dtype)


class _Outputs(_Function):
    """A random sum of the outputs, as a function of the feature maps."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._held = HeldStatistics()  # as the saliency has it
        self.start = maps_of(subject.run())

    def _sum(self, maps: Sequence[Tensor]) -> Tensor:
        statistics = self._held if self._subject.options.cross_sample == "fix" else None
        run = self._subject.run(handed(self._subject, maps), statistics=statistics)
        batch_first(run.forward, self._subject.options.batch_axis)
        total = torch.zeros((), dtype=torch.float64, device=run.forward.device)
        for output in run.forward.outputs:
            factors = torch.linspace(-1, 2, max(output.numel(), 1), dtype=torch.float64, device=output.device).sin()
            total = total + (output.double().flatten() * factors).sum()
        return total

    def slope(self, directions: Sequence[Tensor]) -> tuple[float, float]:
        leaves = [values.clone().requires_grad_() for values in self.start]
        value = self._sum(leaves)
        found = gradients_of([value], leaves)
        return _along(found, directions), _floor(value, self.start[0])

    def at(self, step: float, directions: Sequence[Tensor]) -> float:
        moved = [values + step * direction for values, direction in zip(self.start, directions)]
        return float(self._sum([values.requires_grad_() for values in moved]).detach())


class _OfPenalty(_Function):
    """The penalty, as a function of parameters."""

    def __init__(self, subject: Subject, parameters: list[nn.Parameter]) -> None:
        self._subject = subject
        self._parameters = parameters
        self.start = [one.detach().clone() for one in parameters]

    def _penalty(self) -> Tensor:
        run = self._subject.run()
        run.twin._reach._custom_backward = "ignore"  # it is looked at here
        return self._subject.penalty(run)

    def slope(self, directions: Sequence[Tensor]) -> tuple[float, float]:
        value = self._penalty()
        if not value.requires_grad:
            return 0.0, _floor(value, self.start[0])
        found = gradients_of([value], self._parameters)
        return _along(found, directions), _floor(value, self.start[0])

    def at(self, step: float, directions: Sequence[Tensor]) -> float:
        with torch.no_grad():
            for one, values, direction in zip(self._parameters, self.start, directions):
                one.copy_(values + step * direction)
        try:
            return float(self._penalty().detach())
        finally:
            with torch.no_grad():
                for one, values in zip(self._parameters, self.start):
                    one.copy_(values)


def _along(found: Sequence[Tensor | None], directions: Sequence[Tensor]) -> float:
    pairs = zip(found, directions)
    return sum(float((one.double() * direction.double()).sum()) for one, direction in pairs if one is not None)


def _floor(value: Tensor, moved: Tensor) -> float:
    if not bool(value.detach()):
        return math.inf  # at its least, where the distances have a kink
    return (1e-6 if moved.dtype == torch.float64 else 3e-3) * abs(float(value.detach()))
