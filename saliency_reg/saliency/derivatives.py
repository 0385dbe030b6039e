"""Whether the gradients of a head are its derivatives: by finite differences, once, on a copy of it in float64."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..torch_tools import Edge, gradients_of, nodes_between, without_autocast

_SAMPLES = 2
_MOST_PARAMETERS = 5_000_000
#: Relative to the feature map. A kink may lie in a large step, and a layer that computes in float32 drowns a small one.
_STEPS = (1e-5, 1e-3, 1e-7)
_OURS = __name__.partition(".")[0]


class Derivatives(Enum):
    """What finite differences of a head say of its gradients."""

    RIGHT = "right"
    NOT_FIRST = "its backward is not its derivative"
    NOT_SECOND = "a part of its second derivative is missing"
    UNKNOWN = "it could not be run on its own"


def custom_functions(outputs: Sequence[Tensor], features: Sequence[Edge]) -> list[str]:
    """Return the names of the autograd Functions between features and outputs that neither torch nor this package wrote."""
    behind = nodes_between(outputs, features)
    found = [getattr(type(node), "_forward_cls", None) for node in behind if isinstance(node, BackwardCFunction)]
    theirs = [one for one in found if one is not None and one.__module__.partition(".")[0] not in ("torch", _OURS)]
    return sorted({one.__name__ for one in theirs})


def is_torchs_own(head: nn.Module) -> bool:
    """Whether all of its code is torch's, whose derivatives are right."""
    return all(type(part).__module__.startswith("torch.nn.") and "forward" not in vars(part) for part in head.modules())


def derivatives_of(head: nn.Module, feature: Tensor) -> Derivatives:
    """Compare first and second derivatives of ``head(feature)`` with finite differences, for a few samples.

    The head itself does not run, but a copy of it, without hooks: parameters, buffers and what the forward keeps stay as
    they are, and the random numbers that it draws are put back.
    """
    devices = [feature.device] if feature.device.type == "cuda" else []
    parameters = list(head.parameters())
    if (
        any(type(one) is not nn.Parameter for one in parameters)
        or sum(map(Tensor.numel, parameters)) > _MOST_PARAMETERS
    ):
        return Derivatives.UNKNOWN
    try:
        with torch.enable_grad(), without_autocast(feature), torch.random.fork_rng(devices=devices):
            return _compared(_Copy(head, feature))
    except Exception:  # whatever a head does that is not made for this
        return Derivatives.UNKNOWN


def _compared(copied: _Copy) -> Derivatives:
    right_first, right_second = False, False
    for number, step in enumerate(_STEPS):
        generator = torch.Generator().manual_seed(number)
        directions = copied.directions(generator)
        slope, curve = copied.at(0.0, directions)
        before, after = (copied.at(sign * step, directions)[0] for sign in (-1.0, 1.0))
        along = copied.along_feature(step, directions)
        if not bool(torch.stack([slope, curve, before, after, along]).isfinite().all()):
            return Derivatives.UNKNOWN
        floor = 1e-3 * float(slope.abs())
        right_first |= _close(slope, along, floor)
        right_second |= _close(curve, (after - before) / (2 * step), floor)
        if right_first and right_second:
            return Derivatives.RIGHT
    return Derivatives.NOT_SECOND if right_first else Derivatives.NOT_FIRST


def _close(found: Tensor, wanted: Tensor, floor: float) -> bool:
    return bool((found - wanted).abs() <= 1e-2 * torch.maximum(found.abs(), wanted.abs()) + floor)


class _Copy:
    """A head in float64, as a function of its first samples and its parameters."""

    def __init__(self, head: nn.Module, feature: Tensor) -> None:
        self.head = head
        first = feature[:_SAMPLES].detach().double()
        self.scale = float(first.square().mean().sqrt()) or 1.0
        # Maps hold many equal values (zeros of a ReLU), at which a maximum has no derivative.
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        noise = noise.abs() if bool((first >= 0).all()) else noise
        self.start = first + 0.01 * self.scale * noise.to(first.device)

    def directions(self, generator: torch.Generator) -> list[Tensor]:
        """At the feature map, and at each parameter that is trained."""
        tensors = [self.start, *(one for one in self.head.parameters() if one.requires_grad)]
        scales = [self.scale] + [float(one.detach().double().square().mean().sqrt()) or 1.0 for one in tensors[1:]]
        return [
            scale * torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one.device)
            for one, scale in zip(tensors, scales)
        ]

    def run(self, feature: Tensor, step: float, directions: Sequence[Tensor]) -> tuple[Tensor, list[nn.Parameter]]:
        """Return a random sum of the outputs, and the parameters, moved by the step."""
        twin = _twin(self.head, {}, {})
        twin.double()
        trained = [one for one in twin.parameters() if one.requires_grad]
        with torch.no_grad():
            for one, direction in zip(trained, directions):
                one.add_(direction, alpha=step)
        devices = [feature.device] if feature.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # the same dropout each time
            output = twin(feature)
        seed = torch.linspace(-1, 2, output.numel(), dtype=torch.float64, device=output.device).sin().view_as(output)
        total: Tensor = (output * seed).sum()
        return total, trained

    def at(self, step: float, directions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sum's derivative along the feature's direction, and at step 0 that one's along all directions."""
        feature = (self.start + step * directions[0]).requires_grad_()
        value, trained = self.run(feature, step, directions[1:])
        (gradient,) = gradients_of([value], [feature], create_graph=True)
        assert gradient is not None
        slope = (gradient * directions[0]).sum()
        curve = torch.zeros_like(slope)
        if step == 0 and slope.requires_grad:
            found = gradients_of([slope], [feature, *trained])
            for one, direction in zip(found, directions):
                curve = curve if one is None else curve + (one * direction).sum()
        return slope.detach(), curve

    def along_feature(self, step: float, directions: Sequence[Tensor]) -> Tensor:
        ends = [self.run(self.start + sign * step * directions[0], 0.0, [])[0].detach() for sign in (1.0, -1.0)]
        return (ends[0] - ends[1]) / (2 * step)


def _twin(module: nn.Module, modules: dict[nn.Module, nn.Module], tensors: dict[Tensor, Any]) -> nn.Module:
    """Copy modules, parameters and buffers, and nothing else that they refer to."""
    if module not in modules:
        twin = modules[module] = copy.copy(module)
        for name, value in list(vars(twin).items()):
            vars(twin)[name] = _containers_copied(value)  # in which its forward may keep something
            if name.startswith(("_forward_", "_backward_")) and "hooks" in name:
                vars(twin)[name] = OrderedDict()
        for name in ("_parameters", "_buffers"):
            own = {}
            for key, value in vars(module)[name].items():
                if value is not None and value not in tensors:
                    fresh = value.detach().clone()
                    tensors[value] = nn.Parameter(fresh, value.requires_grad) if name == "_parameters" else fresh
                own[key] = None if value is None else tensors[value]
            vars(twin)[name] = own
        vars(twin)["_modules"] = {
            name: None if child is None else _twin(child, modules, tensors) for name, child in module._modules.items()
        }
    return modules[module]


def _containers_copied(value: Any) -> Any:
    if not isinstance(value, (list, dict, set, deque)):
        return value
    twin: Any = copy.copy(value)
    if not isinstance(value, set):
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
            twin[key] = _containers_copied(part)
    return twin
