"""Images for a first run of a timm model, and notes of what its methods and modules return in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def blank_images(model: nn.Module, channels: int, image_size: tuple[int, int]) -> Tensor:
    """Return zeros ``[1, channels, height, width]`` in the model's number format, on its device."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(1, channels, *image_size, dtype=like.dtype, device=like.device)


def published_config(model: nn.Module) -> dict[str, Any]:
    """Return what timm publishes with the weights of a model: size and mean of the images, name of the classifier, ..."""
    return dict(getattr(model, "pretrained_cfg", None) or {})


def published_names(model: nn.Module, entry: str) -> tuple[str, ...]:
    """Return the names of modules under ``entry``: one, several, or none."""
    names = published_config(model).get(entry)
    return (names,) if isinstance(names, str) else tuple(names or ())


def image_shape_of(model: nn.Module) -> tuple[int, int, int]:
    """Return ``(channels, height, width)`` of the images that a timm model was built for."""
    channels, height, width = published_config(model).get("input_size", (3, 224, 224))
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
    """Return the channels of the images: what the model says of itself, or else its first convolution."""
    told = getattr(model, "in_chans", None) or getattr(model, "_model_args", {}).get("in_chans")
    if isinstance(told, int):
        return told
    for name in published_names(model, "first_conv"):
        module = dict(model.named_modules()).get(name)
        if isinstance(module, nn.Conv2d) and module.in_channels not in (4 * published, 16 * published):
            return module.in_channels  # else pixels are moved into channels in front of it
    return published


@contextlib.contextmanager
def calls_noted(
    model: nn.Module, method: str, then: Callable[[Any], Any] | None = None
) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Any]]]:
    """Within, each call of a method of ``model`` is noted as ``(args, kwargs, returned)``; ``then`` may replace the last."""
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


@contextlib.contextmanager
def outputs_noted(
    model: nn.Module, keep: Callable[[nn.Module, Any], bool] = lambda *_: True
) -> Iterator[list[tuple[str, nn.Module, Any]]]:
    """Within, outputs of modules are noted as ``(name, module, output)`` in the order in which the modules end."""
    outputs: list[tuple[str, nn.Module, Any]] = []

    def note(name: str, module: nn.Module, _args: Any, output: Any) -> None:
        if keep(module, output):
            outputs.append((name, module, output))

    handles = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules() if name]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
