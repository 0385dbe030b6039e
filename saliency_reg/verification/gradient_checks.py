"""Rows ``reach`` and ``derivatives``: where the gradient of the penalty arrives, and whether it is the derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..regularizer import HeadForm
from ..saliency import batch_first, custom_functions
from ..torch_tools import gradients_of
from .culprits import (
    behind_the_feature,
    changed_in_place,
    detached_parts,
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
    if detached := detached_parts(run, parts):
        heads = {part for head in subject.heads.modules for part in head.modules()}
        where = "in the heads" if all(part.module in heads for part in detached) else "in front of the outputs"
        names = ", ".join(map(str, detached[:6]))
        return Check("reach", False, f"the outputs do not depend on these parts, which ran and can be trained: {names}",
                     f"Something is detached {where}: look for .detach(), .data, .item(), no_grad behind them.")  # fmt: skip
    try:
        penalty = subject.penalty(run)
    except RuntimeError as error:
        if "inplace" in str(error) or "in place" in str(error):
            if changed := changed_in_place(parts):
                names = ", ".join(map(str, changed[:6]))
                return Check("reach", False, f"changed in place after it was returned, but needed for a gradient: {names}",
                             "Use the operation that makes a new tensor: x = x + y, not x += y.")  # fmt: skip
        raise
    if not penalty.requires_grad:
        return Check("reach", False, "the penalty has a value and no gradient: it trains nothing", _TRAIN_HEADS)
    named = [(name, one) for name, one in subject.model.named_parameters() if one.requires_grad]
    found = gradients_of([penalty], [one for _, one in named])
    in_heads = {id(one) for head in subject.heads.modules for one in head.parameters()}
    backbone = [(name, found[i]) for i, (name, one) in enumerate(named) if id(one) not in in_heads]
    reached = [name for name, gradient in backbone if gradient is not None and bool(gradient.any())]
    size = sum(float(gradient.double().square().sum()) for _, gradient in backbone if gradient is not None) ** 0.5
    if reached:
        return Check(
            "reach", True, f"yes: {len(reached)} of {len(backbone)} parameters outside of the heads, length {size:.2g}"
        )
    if not backbone:
        return Check(
            "reach", None, "it trains the heads: no parameter outside of them can be trained (frozen, or none)"
        )
    if bool(penalty.detach() == 0):
        return Check("reach", None, "not known: the penalty is 0 in this batch (all saliencies are equal)")
    if run.twin._reach.reaches is False and run.twin._reach.form is not HeadForm.SMOOTH:
        return Check("reach", None, "no, it trains the heads only: they are piecewise linear, so their saliency is locally "
                     "constant", "Use a smooth activation such as GELU in the heads, or target='loss', if it is to.")  # fmt: skip
    return Check("reach", False, f"no gradient arrives at the {len(backbone)} parameters outside of the heads",
                 "Look for .detach(), .data or no_grad between them and the heads.")  # fmt: skip


_TRAIN_HEADS = "Train the heads (they are frozen, or their backward detaches), or use a smooth activation in them."


def derivatives(subject: Subject, tolerance: float | None) -> Check:
    """Compare with finite differences: the saliency along the feature map, and the penalty's gradient along parameters."""
    run, parts = watched_run(subject)
    subject.penalty(run)  # raises where torch knows that something cannot be differentiated twice
    given = run.forward.features[0].tensor.dtype
    double = next((one.device.type for one in subject.model.parameters()), "cpu") != "mps"
    try:
        wrong, dtype = _compared(subject, torch.float64 if double else torch.float32, tolerance)
    except Exception:  # tensors of the model that are no buffers keep their format
        wrong, dtype = _compared(subject, None, tolerance)
    if not wrong:
        text = f"finite differences agree with the saliency and with the penalty's gradient ({str(dtype)[6:]})"
        return Check(
            "derivatives", True, text if dtype == torch.float64 or given == dtype else f"{text}, not in {given}"
        )
    custom = subject.run()
    edges = [edge for feature in custom.forward.features for edge in feature.edges]
    named = {", ".join(map(str, found)): kind for kind, found in parts_without_derivative(subject, parts).items()}
    words = [f"{kind}: {names}" for names, kind in named.items()]
    if functions := custom_functions(custom.forward.outputs, edges):
        words.append(f"autograd functions on the way: {', '.join(functions)}")
    if not named and (changed := patched(behind_the_feature(subject, parts))):
        words.append(f"parts with a forward of their own: {', '.join(map(str, changed[:6]))}")
    where = f" ({'; '.join(words)})" if words else ""
    return Check("derivatives", False, f"{' and '.join(wrong)}{where}", _ADVICE)


_ADVICE = (
    "Move what is meant (reversal, scaling, straight-through) in front of the feature map; otherwise save inputs by "
    "ctx.save_for_backward and compute in backward with torch operations."
)


def _compared(subject: Subject, dtype: torch.dtype | None, tolerance: float | None) -> tuple[list[str], torch.dtype]:
    """Return what is not as it should be, in words, and the number format in which that was found out."""
    wrong = []
    with subject.swapped(dtype) as named:
        inner = subject.run().forward.features[0].tensor.dtype
        used = torch.float64 if inner == torch.float64 else torch.float32
        steps, allowed = _STEPS[used], tolerance or (1e-2 if used == torch.float64 else 5e-2)
        if subject.replaceable and not _agree(_Outputs(subject), steps, allowed):
            wrong.append("the saliency is not the derivative of the outputs")
        in_heads = {id(one) for head in subject.heads.modules for one in head.parameters()}
        for words, own in (
            ("the heads", [one for _, one in named if id(one) in in_heads]),
            ("the other parts", [one for _, one in named if id(one) not in in_heads]),
        ):
            if own and not _agree(_OfPenalty(subject, own), steps, allowed):
                wrong.append(f"a part of the penalty's gradient is missing at the parameters of {words}")
    return wrong, inner


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
        run: Run = self._subject.run()
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
    return (1e-6 if moved.dtype == torch.float64 else 3e-3) * abs(float(value.detach()))
