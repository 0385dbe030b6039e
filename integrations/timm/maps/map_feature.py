"""The feature map at which saliency maps are taken, with its place in the graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....capture import contents
from ....errors import CaptureError
from ..backbone.feature_layout import FeatureLayout, Joined, layout_of
from ..backbone.probing import calls_noted


@dataclass(frozen=True)
class MapFeature:
    """Feature maps of one forward.

    Attributes:
        tensors: which require grad.
        layouts: of each.
        name: for a person.
    """

    tensors: tuple[Tensor, ...]
    layouts: tuple[FeatureLayout, ...]
    name: str

    @property
    def spatial(self) -> bool:
        """Whether all of them have positions."""
        return all(layout.spatial for layout in self.layouts)

    def activation(self, image_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """All of them as one map ``[B, C, H, W]`` at the finest grid."""
        tensors = [tensor.detach().to(dtype) for tensor in self.tensors]
        return _side_by_side([own.to_maps(each, image_size) for own, each in zip(self.layouts, tensors)], shared=False)

    def gradient(self, gradients: Sequence[Tensor], image_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The gradient at :meth:`activation`, from those at the tensors."""
        pairs = zip(self.layouts, gradients)
        return _side_by_side([own.gradient_to_maps(each.to(dtype), image_size) for own, each in pairs], shared=True)


def _side_by_side(maps: Sequence[Tensor], shared: bool) -> Tensor:
    """``[B, C_i, H_i, W_i]`` at the finest grid; ``shared``: what one position has is divided among those it covers."""
    finest = max((each.shape[2:] for each in maps), key=lambda grid: grid.numel())
    brought = []
    for each in maps:
        covered = finest.numel() / each.shape[2:].numel() if shared else 1.0
        same = each.shape[2:] == finest
        brought.append(each if same else nn.functional.interpolate(each, finest, mode="nearest-exact") / covered)
    return torch.cat(brought, 1)


@contextlib.contextmanager
def last_feature(model: nn.Module, method: str, layout: FeatureLayout, name: str) -> Iterator[list[MapFeature]]:
    """Within, what a method of ``model`` returns is noted, as tensors that require grad and have nothing in front.

    Args:
        model: of which ``method`` is called once in the forward.
        method: ``"forward_features"`` of a timm model, ``"forward"`` of a :class:`Backbone`.
        layout: of what it returns.
        name: for a person.
    """
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
    """Within, the output of a module is noted, as a tensor that requires grad and has nothing in front.

    Args:
        module: whose last run counts.
        name: of it.
        layout: of its output.

    Raises:
        CaptureError: it returns something else than a tensor.
    """
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


@contextlib.contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Within, names and outputs of all modules are noted in the order in which they end."""
    outputs: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(own: nn.Module, _args: Any, output: Any) -> None:
            # A projection is one of several ways (queries, keys, values) that begin at the norm in front of it.
            if isinstance(output, Tensor) and output.requires_grad and not isinstance(own, nn.Linear):
                outputs.append((name, output))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def deepest_feature(
    outputs: Sequence[tuple[str, Tensor]],
    scalars: Sequence[Tensor],
    timm_model: nn.Module,
    channels: Collection[int],
    image_size: tuple[int, int],
) -> MapFeature | None:
    """The last of the recorded outputs at whose positions every scalar has a gradient, but for those without any.

    ``None`` if there is none.

    Only maps with one of these numbers of channels count, those of the model's features: others are inside of blocks.
    """
    places: list[tuple[str, Tensor, FeatureLayout]] = []
    for name, output in outputs:
        if output.ndim not in (3, 4):
            continue
        layout = layout_of(output, timm_model, image_size, channels_last=output.shape[-1] in channels)
        if layout.spatial and layout.channels in channels:
            places.append((name, output, layout))
    if not places:
        return None
    reached = [True] * len(places)
    for scalar in scalars:
        found = gradients_of(scalar, [output for _, output, _ in places])
        if not any(gradient is not None and bool(gradient.any()) for gradient in found):
            continue  # a head that depends on nothing
        for index, ((_, _, layout), gradient) in enumerate(zip(places, found)):
            reached[index] &= gradient is not None and bool(layout.to_maps(gradient, image_size).any())
    last = [place for place, whether in zip(places, reached) if whether]
    if not last:
        return None
    name, output, layout = last[-1]
    return MapFeature((output,), (layout,), name)


def gradients_of(scalar: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """At each of the tensors; ``None`` where the scalar does not depend on it."""
    if not scalar.requires_grad:
        return (None,) * len(tensors)
    return torch.autograd.grad(scalar, list(tensors), retain_graph=True, allow_unused=True)
