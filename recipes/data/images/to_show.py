"""Test images for the saliency picture."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saliency_reg.integrations.timm import TimmMultiTaskModel

from ..sources import SampleSource


@dataclass(frozen=True)
class Picture:
    """Some test images for the saliency picture.

    Attributes:
        images: ``[n, 3, H, W]``, as the model takes them.
        labels: ``[n, T]``, NaN where one is missing.
        mean, std: of the channels in [0, 1].
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


def first_images(model: TimmMultiTaskModel, images: SampleSource, count: int = 6) -> Picture:
    """The first ones of a data set with the model's transform."""
    pixels, labels = zip(*(images[index] for index in range(min(count, len(images)))))
    return Picture(torch.stack(pixels), torch.stack(labels), *mean_and_std(model))


def mean_and_std(model: TimmMultiTaskModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of the channels in [0, 1], that the model's transform brings to 0 and 1."""
    for step in model.transforms(train=False).transforms:
        if hasattr(step, "mean") and hasattr(step, "std"):
            return tuple(map(float, step.mean)), tuple(map(float, step.std))
    return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
