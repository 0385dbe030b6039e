"""Running a model once to look at it, without leaving a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def blank_images(model: nn.Module, channels: int, image_size: tuple[int, int], batch_size: int = 1) -> Tensor:
    """``[B, channels, height, width]`` zeros in the model's number format, on its device."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(batch_size, channels, *image_size, dtype=like.dtype, device=like.device)


def image_shape_of(model: nn.Module) -> tuple[int, int, int]:
    """``(channels, height, width)`` of the images that a timm model was built for."""
    config = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = config.get("input_size", (3, 224, 224))
    built_for = [getattr(model, "_traits", {}).get("img_size"), getattr(model, "_model_args", {}).get("img_size")]
    for size in [*built_for, *(getattr(module, "img_size", None) for module in model.modules())]:
        if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(side, int) for side in size):
            height, width = size
            break
        if isinstance(size, int):
            height = width = size
            break
    return _in_chans(model, int(channels)), int(height), int(width)


def _in_chans(model: nn.Module, published: int) -> int:
    """Channels of the images: what the model says of itself, or else its first convolution."""
    told = getattr(model, "in_chans", None) or getattr(model, "_model_args", {}).get("in_chans")
    if isinstance(told, int):
        return told
    first = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    for name in (first,) if isinstance(first, str) else tuple(first or ()):
        module = dict(model.named_modules()).get(name)
        if isinstance(module, nn.Conv2d) and module.in_channels not in (4 * published, 16 * published):
            return module.in_channels  # else pixels are moved into channels in front of it
    return published


@contextlib.contextmanager
def calls_noted(
    model: nn.Module, method: str, then: Callable[[Any], Any] | None = None
) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Any]]]:
    """Within, each call of a method of ``model`` is noted as ``(args, kwargs, returned)``.

    Args:
        model: whose method it is.
        method: its name.
        then: called with what a call returned; what it returns takes its place.
    """
    original = getattr(model, method)
    before = vars(model).get(method)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def noting(*args: Any, **kwargs: Any) -> Any:
        returned = original(*args, **kwargs)
        if then is not None:
            returned = then(returned)
        calls.append((args, kwargs, returned))
        return returned

    vars(model)[method] = noting
    try:
        yield calls
    finally:
        if before is None:
            del vars(model)[method]
        else:
            vars(model)[method] = before


def parameters_behind(outputs: Sequence[Any]) -> set[int]:
    """Ids of the leaves that tensors were computed from."""
    waiting = [tensor.grad_fn for tensor in outputs if isinstance(tensor, Tensor) and tensor.grad_fn is not None]
    seen: set[Any] = set(waiting)
    found: set[int] = set()
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        for behind, _ in node.next_functions:
            if behind is not None and behind not in seen:
                seen.add(behind)
                waiting.append(behind)
    return found
