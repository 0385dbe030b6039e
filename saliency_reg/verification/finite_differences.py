"""Functions of feature maps and parameters, whose derivatives are compared with finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..saliency import batch_first
from ..torch_tools import gradients_of, leaves_behind
from .saliency_checks import handed, maps_of
from .subject import Subject

#: Relative to what is moved. A kink may lie in a large step, and a layer that computes in float32 drowns a small one.
STEPS = {torch.float64: (1e-5, 1e-3, 1e-7), torch.float32: (1e-2, 3e-3, 3e-2)}


@dataclass
class Function:
    """A number, as a function of feature maps ``[B, ...]`` and of parameters, some of which are moved."""

    value: Callable[[Sequence[Tensor]], Tensor]  # of feature maps; those of the forward where there are none
    maps: list[Tensor]
    parameters: list[nn.Parameter]
    move_maps: bool = True

    def __post_init__(self) -> None:
        self.start = [*(self.maps if self.move_maps else []), *(one.detach().clone() for one in self.parameters)]

    def slope(self, directions: Sequence[Tensor]) -> tuple[float, float]:
        """Return the derivative along the directions as autograd has it, and how large a difference means nothing."""
        leaves = [values.clone().requires_grad_() for values in self.maps]
        value = self.value(leaves)
        moved = [*(leaves if self.move_maps else []), *self.parameters]
        found = gradients_of([value], moved) if value.requires_grad and moved else []
        pairs = [(one.double(), along.double()) for one, along in zip(found, directions) if one is not None]
        size = abs(float(value.detach()))
        # At its least, 0, the distances have a kink.
        floor = (1e-6 if value.dtype == torch.float64 else 3e-3) * size if size else math.inf
        return sum(float((one * along).sum()) for one, along in pairs), floor

    def at(self, step: float, directions: Sequence[Tensor]) -> float:
        """Return the number at so many times the directions from where it begins."""
        moved = [values + step * direction for values, direction in zip(self.start, directions)]
        first = len(self.start) - len(self.parameters)
        maps = moved[:first] if self.move_maps else [values.clone() for values in self.maps]
        try:
            self._set(moved[first:])
            return float(self.value([values.requires_grad_() for values in maps]).detach())
        finally:
            self._set(self.start[first:])

    @torch.no_grad()
    def _set(self, parameters: Sequence[Tensor]) -> None:
        for one, values in zip(self.parameters, parameters):
            one.copy_(values)


def agrees(function: Function, steps: Sequence[float], allowed: float) -> bool:
    """Whether the derivative along a random direction is that of a finite difference, in one of the steps."""
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


def of_outputs(subject: Subject) -> Function:
    """Return a random sum of the outputs, as a function of the feature maps."""

    def value(maps: Sequence[Tensor]) -> Tensor:
        run = subject.run(handed(subject, maps))
        batch_first(run.forward, subject.options.batch_axis)
        total = torch.zeros((), dtype=torch.float64, device=run.forward.device)
        for output in run.forward.outputs:
            factors = torch.linspace(-1, 2, max(output.numel(), 1), dtype=torch.float64, device=output.device).sin()
            total = total + (output.double().flatten() * factors).sum()
        return total

    return Function(value, maps_of(subject), [])


def of_penalty(subject: Subject, parameters: list[nn.Parameter], *, move_maps: bool = True) -> Function:
    """Return the penalty, as a function of parameters, and of the feature maps unless the input of a module was named."""

    def value(maps: Sequence[Tensor]) -> Tensor:
        run = subject.run(handed(subject, maps) if maps else None)
        run.twin._reach._custom_backward = "ignore"  # it is looked at here
        return subject.penalty(run)

    return Function(value, maps_of(subject) if subject.replaceable else [], parameters, move_maps)


def behind(subject: Subject) -> list[nn.Parameter]:
    """Return the trained parameters between the feature maps and the outputs."""
    maps = [values.requires_grad_() for values in maps_of(subject)]
    behind = {id(leaf) for leaf in leaves_behind(subject.run(handed(subject, maps)).forward.outputs)}
    return [one for one in subject.model.parameters() if id(one) in behind]
