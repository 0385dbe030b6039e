"""CIFAR-10 as many binary tasks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import DataError, OptionError
from ..hub import fingerprint_of, load_splits
from ..label_columns import check_columns
from .in_columns import decoded_pixels
from .in_memory import AugmentedImages, Images, resized

HUB_ID = "uoft-cs/cifar10"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
#: Properties that several classes share: tasks that do not exclude each other, as in CelebA; two are opposites.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "animal": ("bird", "cat", "deer", "dog", "frog", "horse"),
    "vehicle": ("airplane", "automobile", "ship", "truck"),
    "mammal": ("cat", "deer", "dog", "horse"),
    "four legs": ("cat", "deer", "dog", "frog", "horse"),
    "hooves": ("deer", "horse"),
    "pet": ("cat", "dog"),
    "small animal": ("bird", "cat", "frog"),
    "lives in the wild": ("bird", "deer", "frog"),
    "feathers or skin": ("bird", "frog"),
    "flies": ("airplane", "bird"),
    "wheels": ("airplane", "automobile", "truck"),
    "on roads": ("automobile", "truck"),
    "on water": ("ship", "frog"),
    "carries people": ("airplane", "automobile", "horse", "ship", "truck"),
    "carries freight": ("airplane", "ship", "truck"),
}
TASK_SETS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "classes": {name: (name,) for name in CLASSES},
    "attributes": ATTRIBUTES,
}


@dataclass(frozen=True)
class CifarSplits:
    """Train, validation and test images of the same tasks."""

    tasks: tuple[str, ...]
    train: AugmentedImages | Images
    validation: Images
    test: Images
    test_classes: Tensor
    """``[N]``, of the test images."""


def cifar_splits(
    data: str,
    *,
    seed: int,
    train_images: int,
    validation_images: int,
    image_size: int = 32,
    tasks: str = "classes",
    labelled: float = 1.0,
    augmented: bool = True,
) -> CifarSplits:
    """Splits with equally many images of each class.

    Training and validation images are drawn anew for each seed from the training split; the test images are all of the
    test split. So a hyper-parameter has seen the test images of no seed.

    Args:
        data: id of a data set on the hub, or a folder of parquet files, with the columns ``img`` and ``label``.
        seed: of the draws.
        train_images, validation_images: in all, multiples of ten.
        image_size: height and width.
        tasks: ``"classes"`` (one against the rest) or ``"attributes"``.
        labelled: share of the training labels that is kept, drawn at random for each image and task.
        augmented: mirror and shift training images at random.

    Raises:
        DataError: the data cannot be read, or are others.
        OptionError: more images than there are, or not a multiple of ten.
    """
    if tasks not in TASK_SETS:
        raise OptionError(f"found the tasks {tasks!r}. Use one of {', '.join(TASK_SETS)}.")
    if not 0 < labelled <= 1:
        raise OptionError(f"the share of labels that is kept must be above 0 and at most 1, found {labelled}.")
    for name, count in (("training", train_images), ("validation", validation_images)):
        if count < 10 or count % 10:
            raise OptionError(f"found {count} {name} images. Pass a multiple of ten: as many for each class.")
    pixels, classes, test_pixels, test_classes = _loaded(data, image_size)
    most = int(classes.bincount(minlength=10).min()) * 10
    if train_images + validation_images > most:
        raise OptionError(
            f"{train_images} training and {validation_images} validation images were asked for, but there are {most} of "
            f"which each class has as many. Use {most} or less for both together."
        )
    generator = torch.Generator().manual_seed(seed)
    train, validation = [], []
    for number in range(10):
        rows = torch.nonzero(classes == number).squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        train.append(rows[: train_images // 10])
        validation.append(rows[train_images // 10 :][: validation_images // 10])
    table = _label_table(tasks)
    train_rows, validation_rows = torch.cat(train), torch.cat(validation)
    labels = table[classes[train_rows]]
    if labelled < 1:
        kept = torch.rand(labels.shape, generator=generator) < labelled
        labels = torch.where(kept, labels, torch.nan)
    images = Images(pixels[train_rows], labels, MEAN, STD)
    return CifarSplits(
        tuple(TASK_SETS[tasks]),
        AugmentedImages(images) if augmented else images,
        Images(pixels[validation_rows], table[classes[validation_rows]], MEAN, STD),
        Images(test_pixels, table[test_classes], MEAN, STD),
        test_classes,
    )


@functools.lru_cache(maxsize=2)
def fingerprint(data: str, image_size: int = 32) -> str:
    """Of the images and classes, to tell results on other data apart: the hub has other JPEG or PNG files than a copy."""
    return fingerprint_of(*_loaded(data, image_size))


def _label_table(tasks: str) -> Tensor:
    """``[10, T]``: the labels of each class."""
    columns: Sequence[tuple[str, ...]] = list(TASK_SETS[tasks].values())
    return torch.tensor([[float(name in members) for members in columns] for name in CLASSES])


@functools.lru_cache(maxsize=2)
def _loaded(data: str, image_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    splits = load_splits(data, ("train", "test"))
    train, test = (_images_and_classes(splits[name], data, name) for name in ("train", "test"))
    return resized(train[0], image_size), train[1], resized(test[0], image_size), test[1]


def _images_and_classes(split: Any, data: str, name: str) -> tuple[Tensor, Tensor]:
    advice = f"Expected the columns of {HUB_ID}: use --data {HUB_ID}, or the folder of a copy."
    check_columns(("img", "label"), split.column_names, f"the {name} split of {data}", advice)
    if len(split) == 0:
        raise DataError(f"the {name} split of {data} is empty. Choose other data.")
    try:
        classes = torch.tensor(split["label"], dtype=torch.long)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the {name} split of {data} has labels that are no whole numbers ({error}), expected 0 to 9. Choose CIFAR-10."
        ) from error
    if classes.min() < 0 or classes.max() > 9:
        raise DataError(
            f"the {name} split of {data} has labels from {classes.min()} to {classes.max()}, expected 0 to 9. Choose "
            "CIFAR-10."
        )
    return decoded_pixels(split, "img", f"{name} split of {data}"), classes
