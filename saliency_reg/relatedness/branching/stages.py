"""How a backbone is cut into stages that run one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BackboneCutError, ModuleNotFoundInModelError, WrongTypeError
from ...tasks import first_few
from ...torch_tools import version_of
from .trace import Trace, count_layers, in_eval

#: A part that has this share of all layers is what the stages are in: ``blocks``, ``stages``, ``features``.
_MOST = 0.75


@dataclass(frozen=True)
class Stage:
    """A part of a backbone that is copied as a whole.

    Attributes:
        name: of its first layer, ``first..last`` if several modules have weights.
        module: the part; it holds modules of the backbone under their own names.
        poolings_above: how often positions are halved above it, ``p`` of Lu et al.; see :func:`cut`.
    """

    name: str
    module: nn.Module
    poolings_above: int


def cut(backbone: nn.Module, example: Tensor, cuts: Sequence[str] | None = None) -> list[Stage]:
    """Cut a backbone into stages: run one after the other, they are the backbone, bit for bit.

    The forward of the backbone is traced (``torch.fx``) down to its children, and further within one that holds most of the
    layers; those need not be traceable. It can be cut wherever one tensor alone is handed on. By itself, it is before each
    module that has a weight matrix or a kernel: ``layer1`` to ``layer4`` of a ResNet, the stages of a ConvNeXt, the
    blocks of a vision transformer, the layers of a plain ``nn.Sequential``. Norms, activations and pooling stay with what is
    before them.

    ``poolings_above`` counts, for a stage whose first layer makes maps ``[B, C, H, W]``, how often the side is halved from
    there to the smallest map, and pooling to a vector as one more. For VGG16 these are the published 5, 5, 4, 4, 3, ... 0.
    (Maps ``[B, H, W, C]`` are recognised by ``H == W``.) It is 0 for all other stages.

    Args:
        backbone: takes one tensor and returns one. Its modules are not copied: the stages have them.
        example: an input, on which the stages are checked against the backbone, in eval mode.
        cuts: names of the modules after which to cut, instead. ``[]``: not at all.

    Raises:
        BackboneCutError: it cannot be cut, or not there; with the modules after which it can.
        ModuleNotFoundInModelError: ``cuts`` names something that is not in the backbone.

    >>> from torch import nn
    >>> backbone = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    >>> [stage.name for stage in cut(backbone, torch.zeros(1, 3))]
    ['0', '2']
    """
    if not isinstance(backbone, nn.Module):
        raise WrongTypeError(f"backbone must be an nn.Module, found {type(backbone).__name__}.")
    if not isinstance(example, Tensor):
        raise WrongTypeError(f"example must be an input of the backbone, a tensor; found {type(example).__name__}.")
    with in_eval(backbone), torch.no_grad():
        if cuts is None:
            trace = _deepest_trace(backbone)
            return _checked(trace, _automatic_places(trace), example, drop=True)
        trace, places = _named_places(backbone, cuts)
        return _checked(trace, places, example, drop=False)


def _deepest_trace(backbone: nn.Module) -> Trace:
    """Trace into the child that holds most of the layers, as long as there is one that can be traced."""
    trace = Trace(backbone)
    while True:
        called = [name for place in trace.places_of_layers() if (name := trace.called(place)) is not None]
        layers = {name: count_layers(backbone.get_submodule(name)) for name in called}
        most = next((name for name in called if layers[name] >= max(_MOST * count_layers(backbone), 2)), None)
        if most is None:
            return trace
        try:
            trace = Trace(backbone, {*trace.inside, most})
        except BackboneCutError:
            return trace


def _automatic_places(trace: Trace) -> list[int]:
    """Return places before the layers, each as late as it can be."""
    layers = trace.places_of_layers()
    found = []
    for before, layer in pairwise(layers):
        found += [place for place in range(layer, before, -1) if trace.why_not(place) is None][:1]
    if not found:
        raise BackboneCutError(
            f"{type(trace.backbone).__name__} has no place where it can be cut between two layers: nowhere is one tensor "
            "alone handed on. Pass cuts=[] to let it be copied as a whole, or an nn.Sequential of its parts."
        )
    return found


def _named_places(backbone: nn.Module, cuts: Sequence[str]) -> tuple[Trace, list[int]]:
    if isinstance(cuts, str) or not all(isinstance(name, str) for name in cuts):
        raise WrongTypeError(f"cuts must be a list of module names, found {cuts!r}.")
    known = {name for name, _ in backbone.named_modules() if name}
    if unknown := [name for name in cuts if name not in known]:
        raise ModuleNotFoundInModelError(
            f"cuts names {unknown}, which are not in the {type(backbone).__name__}. It can be cut after "
            f"{_possible(backbone)}."
        )
    around = {name.rsplit(".", depth)[0] for name in cuts for depth in range(1, name.count(".") + 1)}
    trace = Trace(backbone, around & known)
    places = []
    for name in cuts:
        place = trace.after(name)
        reason = "its forward does not call it" if place is None else trace.why_not(place)
        if place is None or reason is not None:
            raise BackboneCutError(
                f"the {type(backbone).__name__} cannot be cut after {name!r}: {reason}. It can be cut after "
                f"{_possible(backbone)}."
            )
        places.append(place)
    return trace, sorted(set(places))


def _possible(backbone: nn.Module) -> str:
    return first_few([repr(name) for name in _deepest_trace(backbone).names_of_cuts()], most=12) or "no module"


def _checked(trace: Trace, places: list[int], example: Tensor, *, drop: bool) -> list[Stage]:
    """Build the stages and run them; a place that proves to be none is left out, or an error."""
    expected = trace.backbone(example.clone())
    if not isinstance(expected, Tensor):
        raise BackboneCutError(
            f"the {type(trace.backbone).__name__} returns a {type(expected).__name__}; the heads have to read one tensor. "
            "Wrap it in a module that returns the tensor which they read."
        )
    while True:
        parts, sides, output, bad = _run(trace, places, example)
        if bad is None:
            break
        place, reason = bad
        if not drop or place not in places:
            where = "at its beginning" if place == 1 else f"after {trace.called(place - 1)!r}"
            raise BackboneCutError(f"the {type(trace.backbone).__name__} cannot be cut {where}: {reason}.")
        places = [other for other in places if other != place]
    if not torch.equal(output, expected):
        raise BackboneCutError(
            f"the stages of the {type(trace.backbone).__name__} do not give its output on the example (differences up to "
            f"{float((output - expected).abs().max()):.3g}). Where it draws random numbers in eval mode, make it stop; "
            "otherwise pass an nn.Sequential of its parts."
        )
    smallest = min((side for side in sides if side is not None), default=1.0)
    pooled = int(output.ndim != 4)
    poolings = [0 if side is None else max(round(math.log2(side / smallest)), 0) + pooled for side in sides]
    return [Stage(name, module, above) for (name, module), above in zip(parts, poolings)]


def _run(
    trace: Trace, places: list[int], example: Tensor
) -> tuple[list[tuple[str, nn.Module]], list[float | None], Any, tuple[int, str] | None]:
    """Return the stages, the side of the maps in each, the last output; or the place that does not do, and why."""
    bounds = [1, *places, len(trace.nodes)]
    layers = trace.places_of_layers()
    parts: list[tuple[str, nn.Module]] = []
    sides: list[float | None] = []
    feature: Any = example.clone()
    for start, stop in pairwise(bounds):
        if not isinstance(feature, Tensor):
            return parts, sides, feature, (start, f"a {type(feature).__name__} is handed on there, not a tensor")
        module = trace.part(start, stop)
        inner = [str(trace.called(place)) for place in layers if start <= place < stop]
        before, version = feature, version_of(feature)
        side, feature = _first_side(module, inner, feature)
        if version_of(before) != version:
            reason = (
                "what follows changes its input in place (inplace=True?), so that copies would change it for each other"
            )
            return parts, sides, feature, (start, reason)
        sides.append(side)
        names = inner or [name for place in range(start, stop) if (name := trace.called(place))] or ["output"]
        parts.append((names[0] if names[0] == names[-1] else f"{names[0]}..{names[-1]}", module))
    return parts, sides, feature, None


def _first_side(module: nn.Module, layers: list[str], feature: Tensor) -> tuple[float | None, Any]:
    """Run a stage; return with its output the side of the map that its first layer makes."""
    seen: list[Any] = []
    if not layers:
        return None, module(feature)
    handle = module.get_submodule(layers[0]).register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        output = module(feature)
    finally:
        handle.remove()
    first = seen[0] if seen else None
    if not isinstance(first, Tensor) or first.ndim != 4:
        return None, output
    channels_last = first.shape[1] == first.shape[2] != first.shape[3]
    height, width = first.shape[1:3] if channels_last else first.shape[2:]
    return math.sqrt(height * width), output
