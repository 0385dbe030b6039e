"""The smallest classifier of each family of timm through a training step with the regularizer, in both ways."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
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

from ..runtime.errors import need
from .checks import CheckFailedError, attempt, check_step, must, reason_of
from .runner import report, run_all

WAYS = ("multi_task", "unmodified", "unmodified_map")
#: Sides of images that are tried, from the smallest on.
SIZES = (32, 64, 96, 128, 160, 192, 224, 256)
TASKS = ("first", "second", "third")
BATCH_SIZE = 2
_COLUMNS = ("family", "model", "parameters", "image", "layout", "multi-task", "unmodified", "map", "seconds", "reason")


def families() -> list[str]:
    """Modules of timm that register models."""
    timm = need("timm")
    return [str(module) for module in timm.list_modules() if timm.list_models(module=module)]


def smallest_models(chosen: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``{family: {"model": name, "parameters": number}}``; the reason in place of them where no model can be built.

    Models are built without memory for their weights. Those without a classifier (encoders) count only where a family has
    no other.
    """
    timm = need("timm")
    found: dict[str, dict[str, Any]] = {}
    for family in chosen:
        found[family] = {"model": None, "parameters": None, "reason": "no model is registered"}
        sizes: list[tuple[bool, int, str]] = []
        for name in timm.list_models(module=family):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, num_classes=len(TASKS))
            except Exception as error:  # of timm or of one of its models: told in the table
                found[family]["reason"] = f"{type(error).__name__}: {error}"
                continue
            encoder = getattr(model, "num_classes", 0) != len(TASKS)
            sizes.append((encoder, sum(parameter.numel() for parameter in model.parameters()), name))
        if sizes:
            _, parameters, name = min(sizes)
            found[family] = {"model": name, "parameters": parameters}
    return found


def sweep(chosen: Sequence[str], processes: int, seconds: int) -> dict[str, dict[str, Any]]:
    """Results by family; ``processes`` children at a time, each limited to ``seconds``."""
    print(f"smallest models of {len(chosen)} families", flush=True)
    found = smallest_models(chosen)
    family_of = {entry["model"]: family for family, entry in found.items() if "reason" not in entry}
    results = {name: entry | failed(name, entry["reason"], 0.0) for name, entry in found.items() if "reason" in entry}
    every = run_all(check_family, failed, list(family_of), processes, seconds)
    for number, (model, result) in enumerate(every, start=1):
        results[family_of[model]] = found[family_of[model]] | result
        word = "ok" if passes(result) else f"FAILED {result['reasons']}"
        print(f"{number}/{len(family_of)} {family_of[model]} {model}: {word}", flush=True)
    return dict(sorted(results.items()))


def passes(result: Mapping[str, Any]) -> bool:
    """Whether both ways work."""
    return bool(result["multi_task"] and result["unmodified"])


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per family, and totals."""
    rows = [
        [
            family,
            str(result["model"]),
            "-" if result["parameters"] is None else f"{result['parameters'] / 1e6:.2f}M",
            str(result["image_size"] or "-"),
            str(result["layout"] or "-"),
            *("ok" if result[way] else "FAILED" for way in WAYS),
            f"{result['seconds']:.1f}",
            "; ".join(f"{way}: {reason}" for way, reason in result["reasons"].items()),
        ]
        for family, result in results.items()
    ]
    totals = [
        f"{words}: {sum(result[way] for result in results.values())} of {len(results)}"
        for words, way in zip(("multi-task", "unmodified", "at the map"), WAYS)
    ]
    both = sum(map(passes, results.values()))
    totals.append(f"both ways: {both} of {len(results)} families ({100 * both / max(len(results), 1):.1f} %)")
    return report([_COLUMNS, *rows], 2, totals)


def check_family(name: str) -> dict[str, Any]:
    """Whether a timm model works in each of the :data:`WAYS`, for which images, and ``reasons`` where it does not."""
    begun = time.monotonic()
    torch.manual_seed(0)
    try:
        model = _for_smallest_images(name)
        size, layout = model.image_size, model.backbone.layout.describe()
    except Exception as error:  # of any kind: it is told in the table
        return failed(name, reason_of(error), time.monotonic() - begun)
    result: dict[str, Any] = {"image_size": size[0], "layout": layout, "reasons": {}, "notes": []}
    result["multi_task"] = attempt("multi_task", partial(_check_multi_task, model), result)
    for way, feature in (("unmodified", "auto"), ("unmodified_map", "map")):
        result[way] = attempt(way, partial(_check_unmodified, name, size, feature), result)
    result["seconds"] = time.monotonic() - begun
    return result


def failed(_name: str, reason: str, seconds: float) -> dict[str, Any]:
    """The result of a model that works in no way, for one reason."""
    return {
        "image_size": None,
        "layout": None,
        **dict.fromkeys(WAYS, False),
        "reasons": dict.fromkeys(WAYS[:2], reason),
        "notes": [],
        "seconds": seconds,
    }


def _for_smallest_images(name: str) -> TimmMultiTaskModel:
    """A map of at least 2x2 positions, or else any; an error if no size will do, nor its own."""
    own = need("timm").get_pretrained_cfg(name).input_size[-1]
    sizes = [*(size for size in SIZES if size < own), own]
    with torch.device("meta"):  # shapes alone, in no time also for large models
        quick = [size for size in sizes if isinstance(_at_size(name, size), nn.Module)]
    best: TimmMultiTaskModel | Exception = CheckFailedError("no size was tried")
    for size in sorted(sizes, key=lambda size: size not in quick):
        if isinstance(best, nn.Module) and size not in quick:
            break
        model = _at_size(name, size)
        if isinstance(model, nn.Module) and min(model.backbone.layout.grid or [0]) >= 2:
            return model
        best = best if isinstance(best, nn.Module) else model
    if isinstance(best, Exception):
        raise best
    return best


def _at_size(name: str, size: int) -> TimmMultiTaskModel | Exception:
    heads = dict(zip(TASKS, (1, 1, 3)))
    try:
        model = TimmMultiTaskModel(name, heads, head=HeadConfig(hidden=(8,)), image_size=size)
        with torch.no_grad():
            model.train()(_images(size))  # BatchNorm refuses a single value per channel
        return model
    except (ImageSizeError, ValueError, RuntimeError, AssertionError) as error:
        return error


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
    published = need("timm").get_pretrained_cfg(name)
    if size[0] == published.input_size[-1]:
        model: nn.Module = need("timm").create_model(name, num_classes=3)
        return model
    options: list[dict[str, Any]] = [{}, {"img_size": size[0]}]
    if published.fixed_input_size:
        options.reverse()
    for keywords in options:
        try:
            model = need("timm").create_model(name, num_classes=3, **keywords)
            with torch.no_grad():
                model.eval()(_images(size[0]))
            return model
        except (TypeError, RuntimeError, AssertionError, ValueError):
            continue
    raise CheckFailedError(f"timm itself cannot build {name} for images of {size[0]}")


def _check_maps(model: nn.Module, images: Tensor) -> None:
    maps = task_saliency_maps(model, images)
    must(list(maps.shape[:2]) == [3, BATCH_SIZE] and maps.ndim == 4, f"saliency maps of shape {list(maps.shape)}")
    must(bool(maps.isfinite().all()), "saliency maps that are not finite")
    must(all(bool(own.any()) for own in maps), "saliency maps that are all zero")


def _images(size: int) -> Tensor:
    return torch.randn(BATCH_SIZE, 3, size, size)
