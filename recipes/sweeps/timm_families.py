"""One timm model through everything that a training step with the regularizer has: in both ways, on random images."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import PCGrad
from saliency_reg.integrations.timm import (
    HeadConfig,
    ImageSizeError,
    TimmMultiTaskModel,
    find_classifier,
    saliency_regularizer,
    task_saliency_maps,
)

from .checks import CheckFailedError, check_step, must, reason_of

__all__ = ["SIZES", "check_family", "smallest_image"]

#: Sides of images that are tried, from the smallest on.
SIZES = (32, 64, 96, 128, 160, 192, 224, 256)
TASKS = ("first", "second", "third")
BATCH_SIZE = 2


def check_family(name: str, seed: int = 0) -> dict[str, Any]:
    """What works with a timm model.

    Returns:
        ``image_size``, ``layout``, for each of the ways ``multi_task``, ``unmodified`` and ``unmodified_map`` whether it
        works, ``reasons`` of those that do not, ``notes``, and ``seconds``.
    """
    begun = time.monotonic()
    result: dict[str, Any] = {"image_size": None, "layout": None, "reasons": {}, "notes": []}
    ways: dict[str, Callable[[], None]] = {}
    torch.manual_seed(seed)
    try:
        model = smallest_image(name)
        size = model.image_size
        result.update(image_size=size[0], layout=model.backbone.layout.describe())
        ways["multi_task"] = lambda: _check_multi_task(model)
        ways["unmodified"] = lambda: _check_unmodified(name, size, "auto")
        ways["unmodified_map"] = lambda: _check_unmodified(name, size, "map")
    except Exception as error:
        result["reasons"]["multi_task"] = result["reasons"]["unmodified"] = reason_of(error)
    for way in ("multi_task", "unmodified", "unmodified_map"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                if way in ways:
                    ways[way]()
                result[way] = way in ways
            except Exception as error:
                result[way] = False
                result["reasons"][way] = reason_of(error)
        result["notes"] += [f"{way}: {str(each.message)[:120]}" for each in caught]
    result["seconds"] = time.monotonic() - begun
    return result


def smallest_image(name: str) -> TimmMultiTaskModel:
    """A multi-task model for the smallest images that give it a map of at least 2x2 positions, or any positions.

    Raises:
        ImageSizeError: none of :data:`SIZES`, nor its own size.
    """
    own = _published(name).input_size[-1]
    sizes = [*(size for size in SIZES if size < own), own]
    with torch.device("meta"):  # shapes alone, in no time also for large models
        quick = [size for size in sizes if _at_size(name, size)[0] is not None]
    fallback: TimmMultiTaskModel | None = None
    refused: Exception = CheckFailedError("no size was tried")
    for size in [*quick, *(size for size in sizes if size not in quick)]:
        if fallback is not None and size not in quick:
            break
        model, error = _at_size(name, size)
        if model is None:
            refused = error or refused
            continue
        grid = model.backbone.layout.grid
        if grid is not None and min(grid) >= 2:
            return model
        fallback = fallback or model
    if fallback is None:
        raise refused
    return fallback


def _at_size(name: str, size: int) -> tuple[TimmMultiTaskModel | None, Exception | None]:
    heads = {TASKS[0]: 1, TASKS[1]: 1, TASKS[2]: 3}
    try:
        model = TimmMultiTaskModel(name, heads, head=HeadConfig(hidden=(8,)), image_size=size)
        with torch.no_grad():
            model.train()(_images(size))  # BatchNorm refuses a single value per channel
    except (ImageSizeError, ValueError, RuntimeError, AssertionError) as error:
        return None, error
    return model, None


def _check_multi_task(model: TimmMultiTaskModel) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    regularizer = model.regularizer(strength=0.1, surgery=PCGrad(), optimizer=optimizer)
    try:
        images = _images(model.image_size[0])
        outputs = model(images)
        shapes = [list(output.shape) for output in outputs.values()]
        must(shapes == [[BATCH_SIZE], [BATCH_SIZE], [BATCH_SIZE, 3]], f"outputs of shapes {shapes}")
        losses = {task: output.square().mean() for task, output in outputs.items()}
        check_step(model.backbone, regularizer, optimizer, losses)
        _check_maps(model, images)
    finally:
        regularizer.remove()


def _check_unmodified(name: str, size: tuple[int, int], feature: str) -> None:
    model = _unmodified(name, size).train()
    for classifier in map(model.get_submodule, find_classifier(model)):
        for module in classifier.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim > 1 and not bool(weight.any()):
                # Some families begin with a classifier of zeros, where all saliencies are zero and equal.
                nn.init.normal_(weight, std=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    # A BatchNorm between feature and logits makes the sum over the batch constant, and its saliency rounding errors.
    regularizer = saliency_regularizer(
        model, TASKS, strength=0.1, feature=feature, surgery=PCGrad(), optimizer=optimizer, cross_sample="error"
    )
    try:
        images = _images(size[0])
        logits = model(images)
        must(list(logits.shape) == [BATCH_SIZE, 3], f"logits of shape {list(logits.shape)}")
        losses = {task: logits[:, column].square().mean() for column, task in enumerate(TASKS)}
        check_step(model, regularizer, optimizer, losses)
        _check_maps(model, images)
    finally:
        regularizer.remove()


def _unmodified(name: str, size: tuple[int, int]) -> nn.Module:
    """As a user would build it: with ``img_size`` where the model takes it."""
    import timm

    own = _published(name).input_size[-1]
    if size[0] == own:
        model: nn.Module = timm.create_model(name, num_classes=3)
        return model
    options: Sequence[dict[str, Any]] = [{"img_size": size[0]}, {}]
    if not _published(name).fixed_input_size:
        options = options[::-1]
    for keywords in options:
        try:
            model = timm.create_model(name, num_classes=3, **keywords)
            with torch.no_grad():
                model.eval()(_images(size[0]))
            return model
        except (TypeError, RuntimeError, AssertionError, ValueError):
            continue
    raise CheckFailedError(f"timm itself cannot build {name} for images of {size[0]}")


def _published(name: str) -> Any:
    import timm

    return timm.get_pretrained_cfg(name)


def _check_maps(model: nn.Module, images: Tensor) -> None:
    maps = task_saliency_maps(model, images)
    must(list(maps.shape[:2]) == [3, BATCH_SIZE] and maps.ndim == 4, f"saliency maps of shape {list(maps.shape)}")
    must(bool(maps.isfinite().all()), "saliency maps that are not finite")
    must(all(bool(own.any()) for own in maps), "saliency maps that are all zero")


def _images(size: int) -> Tensor:
    return torch.randn(BATCH_SIZE, 3, size, size)
