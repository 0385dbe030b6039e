"""Data sets of images: handwritten digits, CIFAR-10 and CelebA."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ....data.digits import DIGIT_TASKS, digit_splits
from ....data.hub import fingerprint_of
from ....data.images import celeba, cifar
from ....data.images.in_files import as_seen
from ....data.images.in_memory import AugmentedImages, Images
from ....data.task_kinds import BINARY, TaskKind
from ....models.architectures.blueprint import Blueprint
from ....models.small_networks import small_blueprint
from ....models.small_resnet import SMALL_BACKBONE, SmallResNet, register_small_backbone
from ....runtime.errors import OptionError, need
from ..problem import BINARY_COMPARED, BINARY_METRICS, COMMON_VALUES, DataSet, Problem
from .blueprints import blueprint_of
from .places import folder_of, no_fingerprint
from .spaces import SHARES_THROUGH_HEADS

#: Test images of CIFAR-10 and CelebA are the first so many of a fixed order; of all, 2 cores would predict for minutes.
_TEST_IMAGES = 1000
_MEAN, _STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def _digits(values: Mapping[str, Any], place: Any, seed: int) -> Problem:
    del place
    try:
        splits = digit_splits(seed, values["train_per_class"], values["validation_per_class"])
    except ValueError as error:
        raise OptionError(f"{error} Use fewer.") from error
    blueprint = small_blueprint(splits.tasks, values["activation"])
    return Problem(splits.kinds, splits.train, splits.validation, splits.test, blueprint)


def _cifar(values: Mapping[str, Any], place: Any, seed: int) -> Problem:
    names = ("train_images", "validation_images", "image_size", "tasks", "labelled", "augmented")
    splits = cifar.cifar_splits(folder_of(place, "cifar10"), seed=seed, **{name: values[name] for name in names})
    kinds = dict.fromkeys(splits.tasks, BINARY)
    chosen = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(0))[: values["test_images"]]
    test = Images(splits.test.pixels[chosen], splits.test.labels[chosen], cifar.MEAN, cifar.STD)
    return Problem(kinds, splits.train, splits.validation, test, timm_blueprint(kinds, values))


def _celeba(values: Mapping[str, Any], place: Any, seed: int) -> Problem:
    counts = {name: values[f"{name}_images"] for name in celeba.SPLITS}
    kinds, splits = _faces(
        folder_of(place, "celeba"), tuple(counts.items()), values["labelled"], values["image_size"], seed
    )
    train = AugmentedImages(splits["train"]) if values["augmented"] else splits["train"]
    return Problem(kinds, train, splits["validation"], splits["test"], timm_blueprint(kinds, values))


@functools.lru_cache(maxsize=2)
def _faces(
    place: str, counts: tuple[tuple[str, int | None], ...], labelled: float, size: int, seed: int
) -> tuple[dict[str, TaskKind], dict[str, Images]]:
    """Decoded once for all methods of a seed."""
    found = celeba.faces(place, (), dict(counts), labelled, seed)
    splits = {}
    for name in celeba.SPLITS:
        source = found.images(name, functools.partial(_pixels, size=size))
        pixels = torch.stack([source[index][0] for index in range(len(source))])
        splits[name] = Images(pixels, found.labels[name], _MEAN, _STD)
    return found.kinds, splits


def _pixels(image: Any, size: int) -> Tensor:
    """``[3, size, size]``, uint8."""
    numpy, resampling = need("numpy"), need("PIL.Image").Resampling
    values = numpy.asarray(as_seen(image).resize((size, size), resampling.BILINEAR))
    return torch.from_numpy(values.copy()).permute(2, 0, 1)


def timm_blueprint(kinds: Mapping[str, TaskKind], values: Mapping[str, Any]) -> Blueprint:
    """Any backbone of timm, pooled as its own classifier pools it, with a perceptron for each task on the pooled vector.

    The small ResNet of the recipes is a sequence of blocks, so that cross-stitch networks have units between them.

    Args:
        kinds: of the tasks.
        values: ``backbone`` (``widths`` are those of the small ResNet), ``pretrained``, ``image_size``, ``head_width`` and
            ``activation``; perhaps ``checkpoint_path``.
    """
    # Not above: only what has images needs timm.
    from saliency_reg.integrations.timm import TimmMultiTaskModel

    register_small_backbone()
    options: dict[str, Any] = {name: values.get(name) for name in ("pretrained", "image_size", "checkpoint_path")}
    if values["backbone"] == SMALL_BACKBONE and "widths" in values:
        options["backbone_options"] = {"widths": values["widths"]}

    def backbone() -> nn.Module:
        model = TimmMultiTaskModel(values["backbone"], ["any"], **options)
        inner = model.backbone.model
        if isinstance(inner, SmallResNet):
            return nn.Sequential(inner.stem, inner.blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(model.backbone, model.pooling)

    example = torch.zeros(1, 3, values["image_size"], values["image_size"])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        width = backbone().eval()(example).shape[1]
    return blueprint_of(kinds, backbone, width, values["head_width"], values["activation"], example=example)


def _cifar_fingerprint(place: Any) -> str:
    return cifar.fingerprint(folder_of(place, "cifar10"))


def _celeba_fingerprint(place: Any) -> str:
    found = celeba.faces(folder_of(place, "celeba"), (), dict.fromkeys(celeba.SPLITS), 1.0, 0)
    return fingerprint_of(*found.labels.values())


_IMAGES: dict[str, Any] = {
    **COMMON_VALUES,
    "backbone": SMALL_BACKBONE,
    "pretrained": False,
    "widths": [16, 32, 64],
    "channels_last": True,
    "head_width": 32,
    "learning_rate": 5e-3,
    "labelled": 1.0,
    "augmented": True,
}
DIGITS = DataSet(
    "digits",
    "Digits, {train_per_class} training images of each class",
    {
        **COMMON_VALUES,
        "data": "digits",
        "train_per_class": 5,
        "validation_per_class": 20,
        "epochs": 30,
        "evaluations": 10,
        "batch_size": 10,
        "learning_rate": 5e-3,
        "decay": "constant",
    },
    tasks=len(DIGIT_TASKS),
    build=_digits,
    fingerprint=no_fingerprint,
    metrics=BINARY_METRICS,
    compared=BINARY_COMPARED,
    spaces={"weight decay": (0.0, 0.1, 1.0), "share": SHARES_THROUGH_HEADS},
)
CIFAR = DataSet(
    "cifar_mtl",
    "CIFAR-10, {train_images} training images of {image_size} pixels",
    {
        **_IMAGES,
        "data": "cifar_mtl",
        "tasks": "classes",
        "train_images": 300,
        "validation_images": 300,
        "test_images": _TEST_IMAGES,
        "image_size": 32,
        "epochs": 15,
        "evaluations": 5,
        "batch_size": 50,
    },
    tasks=lambda values: len(cifar.TASK_SETS[values["tasks"]]),
    build=_cifar,
    fingerprint=_cifar_fingerprint,
    metrics=BINARY_METRICS,
    compared=BINARY_COMPARED,
    place=cifar.HUB_ID,
    parts=("backbone",),
)
CELEBA = DataSet(
    "celeba",
    "CelebA, {train_images} training images of {image_size} pixels",
    {
        **_IMAGES,
        "data": "celeba",
        "train_images": 500,
        "validation_images": 500,
        "test_images": _TEST_IMAGES,
        "image_size": 32,
        "epochs": 15,
        "evaluations": 5,
        "batch_size": 50,
    },
    tasks=len(celeba.ATTRIBUTES),
    build=_celeba,
    fingerprint=_celeba_fingerprint,
    metrics=BINARY_METRICS,
    compared=BINARY_COMPARED,
    place=celeba.HUB_ID,
    parts=("backbone",),
)
