"""Functions of feature maps and parameters, whose derivatives are compared with finite differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..saliency import batch_first
from ..torch_tools import gradients_of, leaves_behind
from .saliency_checks import handed, maps_of
from .subject import HeldStatistics, Subject

#: Relative to what is moved. A kink may lie in a large step, and a layer that computes in float32 drowns a small one.
STEPS = {torch.float64: (1e-5, 1e-3, 1e-7), torch.float32: (1e-2, 3e-3, 3e-2)}


class Function:
    """A number, as a function of tensors; ``floor`` is how large a difference means nothing."""

    start: Sequence[Tensor]

    def slope(self, directions: Sequence[Tensor]) -> tuple[float, float]:
        """Return the derivative along the directions as autograd has it, and the floor, relative to a step of 1."""
        raise NotImplementedError

    def at(self, step: float, directions: Sequence[Tensor]) -> float:
        raise NotImplementedError


def agrees(function: Function, steps: Sequence[float], allowed: float) -> bool:
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


class Outputs(Function):
    """A random sum of the outputs, as a function of the feature maps."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._held = HeldStatistics()  # as the saliency has it
        self.start = maps_of(subject)

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
        return _along(found, directions), _floor(value)

    def at(self, step: float, directions: Sequence[Tensor]) -> float:
        moved = [values + step * direction for values, direction in zip(self.start, directions)]
        return float(self._sum([values.requires_grad_() for values in moved]).detach())


class Penalty(Function):
    """The penalty, as a function of parameters, and of the feature maps unless the input of a module was named."""

    def __init__(self, subject: Subject, parameters: list[nn.Parameter], *, move_maps: bool = True) -> None:
        self._subject = subject
        self._parameters = parameters
        self._maps = maps_of(subject) if subject.replaceable else []
        self._moved = self._maps if move_maps else []
        self.start = [*self._moved, *(one.detach().clone() for one in parameters)]

    def _of(self, maps: Sequence[Tensor]) -> Tensor:
        run = self._subject.run(handed(self._subject, maps) if maps else None)
        run.twin._reach._custom_backward = "ignore"  # it is looked at here
        return self._subject.penalty(run)

    def slope(self, directions: Sequence[Tensor]) -> tuple[float, float]:
        leaves = [values.clone().requires_grad_() for values in self._maps]
        value = self._of(leaves)
        moved = [*leaves[: len(self._moved)], *self._parameters]
        found = gradients_of([value], moved) if value.requires_grad and moved else []
        return _along(found, directions), _floor(value)

    def at(self, step: float, directions: Sequence[Tensor]) -> float:
        moved = [values + step * direction for values, direction in zip(self.start, directions)]
        maps = [values.requires_grad_() for values in (*moved[: len(self._moved)], *self._maps[len(self._moved) :])]
        with torch.no_grad():
            for one, values in zip(self._parameters, moved[len(self._moved) :]):
                one.copy_(values)
        try:
            return float(self._of(maps).detach())
        finally:
            with torch.no_grad():
                for one, values in zip(self._parameters, self.start[len(self._moved) :]):
                    one.copy_(values)


def behind(subject: Subject) -> list[nn.Parameter]:
    """Return the trained parameters between the feature maps and the outputs."""
    maps = [values.requires_grad_() for values in maps_of(subject)]
    behind = {id(leaf) for leaf in leaves_behind(subject.run(handed(subject, maps)).forward.outputs)}
    return [one for one in subject.model.parameters() if id(one) in behind]


def _along(found: Sequence[Tensor | None], directions: Sequence[Tensor]) -> float:
    pairs = zip(found, directions)
    return sum(float((one.double() * direction.double()).sum()) for one, direction in pairs if one is not None)


def _floor(value: Tensor) -> float:
    if not bool(value.detach()):
        return math.inf  # at its least, where the distances have a kink
    return (1e-6 if value.dtype == torch.float64 else 3e-3) * abs(float(value.detach()))
