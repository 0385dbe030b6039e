"""The feature map at which saliency maps are taken, as tensors with a place in the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....capture import contents
from ....errors import CaptureError
from ....torch_tools import Gradient, gradients_of
from ..backbone.feature_layout import FeatureLayout, Joined, layout_of
from ..backbone.probing import calls_noted


@dataclass(frozen=True)
class MapFeature:
    """Feature maps of one forward, which require grad; ``name`` is for a person."""

    tensors: tuple[Tensor, ...]
    layouts: tuple[FeatureLayout, ...]
    name: str

    @property
    def spatial(self) -> bool:
        """Whether all of them have positions."""
        return all(layout.spatial for layout in self.layouts)

    def on_positions(self, gradients: Sequence[Gradient], image_size: tuple[int, int]) -> bool:
        """Whether gradients at the tensors reach any position."""
        pairs = zip(self.layouts, gradients)
        return any(each is not None and bool(own.to_maps(each, image_size).any()) for own, each in pairs)

    def activation(self, image_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return all of them as one map ``[B, C, H, W]`` at the finest grid."""
        tensors = [tensor.detach().to(dtype) for tensor in self.tensors]
        return _side_by_side([own.to_maps(each, image_size) for own, each in zip(self.layouts, tensors)], shared=False)

    def gradient(self, gradients: Sequence[Tensor], image_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Return the gradient at :meth:`activation`, from those at the tensors."""
        pairs = zip(self.layouts, gradients)
        return _side_by_side([own.gradient_to_maps(each.to(dtype), image_size) for own, each in pairs], shared=True)


def _side_by_side(maps: Sequence[Tensor], shared: bool) -> Tensor:
    """Join ``[B, C_i, H_i, W_i]`` at the finest grid; ``shared``: divide what one position has among those it covers."""
    finest = max((each.shape[2:] for each in maps), key=lambda grid: grid.numel())
    brought = []
    for each in maps:
        covered = finest.numel() / each.shape[2:].numel() if shared else 1.0
        same = each.shape[2:] == finest
        brought.append(each if same else nn.functional.interpolate(each, finest, mode="nearest-exact") / covered)
    return torch.cat(brought, 1)


@contextlib.contextmanager
def last_feature(model: nn.Module, method: str, layout: FeatureLayout, name: str) -> Iterator[list[MapFeature]]:
    """Within, what a method of ``model`` returns is noted, as tensors that require grad and have nothing in front."""
    found: list[MapFeature] = []

    def cut(returned: Any) -> Any:
        several = isinstance(returned, (list, tuple))
        tensors = tuple(each.detach().requires_grad_() for each in (returned if several else (returned,)))
        layouts = layout.parts if several and isinstance(layout, Joined) else (layout,)
        found.append(MapFeature(tensors, layouts, name))
        # Copies: what comes next may work in place, which a leaf does not allow.
        return [each.clone() for each in tensors] if several else tensors[0].clone()

    with calls_noted(model, method, cut):
        yield found


@contextlib.contextmanager
def named_feature(
    module: nn.Module, name: str, layout: Callable[[Tensor], FeatureLayout]
) -> Iterator[list[MapFeature]]:
    """Within, the output of a module's last run is noted, as a tensor that requires grad and has nothing in front."""
    found: list[MapFeature] = []

    def cut(_module: nn.Module, _args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise CaptureError(
                f"the feature {name!r} is {contents(output)}, expected a floating-point tensor. Choose a module that "
                "returns one."
            )
        feature = output.detach().requires_grad_()
        found[:] = [MapFeature((feature,), (layout(feature),), name)]
        return feature.clone()  # what comes next may work in place

    handle = module.register_forward_hook(cut)
    try:
        yield found
    finally:
        handle.remove()


def may_be_a_map(module: nn.Module, output: Any) -> bool:
    """Whether a module's output can be the map of :func:`deepest_feature`."""
    # A projection is one of several ways (queries, keys, values) that begin at the norm in front of it.
    return isinstance(output, Tensor) and output.requires_grad and not isinstance(module, nn.Linear)


def deepest_feature(
    outputs: Sequence[tuple[str, nn.Module, Tensor]],
    scalars: Sequence[Tensor],
    timm_model: nn.Module,
    channels: Collection[int],
    image_size: tuple[int, int],
) -> MapFeature | None:
    """Return the last of the outputs at whose positions every scalar has a gradient, but for scalars without any.

    Only maps with one of these numbers of channels count, those of the model's features: others are inside of blocks.
    """
    places: list[MapFeature] = []
    for name, _, output in outputs:
        if output.ndim not in (3, 4):
            continue
        layout = layout_of(output, timm_model, image_size, channels_last=output.shape[-1] in channels)
        if layout.spatial and layout.channels in channels:
            places.append(MapFeature((output,), (layout,), name))
    if not places:
        return None
    reached = [True] * len(places)
    for scalar in scalars:
        found = gradients_at(scalar, [place.tensors[0] for place in places])
        if not depends(found):
            continue  # a head that depends on nothing
        for index, (place, gradient) in enumerate(zip(places, found)):
            reached[index] &= place.on_positions([gradient], image_size)
    return next((place for place, whether in zip(reversed(places), reversed(reached)) if whether), None)


def gradients_at(scalar: Tensor, tensors: Sequence[Tensor]) -> tuple[Gradient, ...]:
    """Return the gradients of a scalar, which may depend on nothing."""
    return gradients_of([scalar], tensors) if scalar.requires_grad else (None,) * len(tensors)


def depends(gradients: Sequence[Gradient]) -> bool:
    """Whether any of the gradients is not zero."""
    return any(gradient is not None and bool(gradient.any()) for gradient in gradients)
