"""Images in memory, with a random flip and shift for training."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


class Images:
    """Images in memory as they are, many at once.

    Args:
        pixels: ``[N, 3, H, W]``, uint8.
        labels: ``[N, T]``, NaN where one is missing.
        mean, std: ``[3]``, of the channels in [0, 1], for the normalisation.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        self.pixels = pixels
        self.labels = labels
        self._mean = torch.tensor(mean).view(3, 1, 1) * 255
        self._scale = 1 / (torch.tensor(std).view(3, 1, 1) * 255)

    def __len__(self) -> int:
        return len(self.pixels)

    def rows_as_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Normalised images ``[b, 3, H, W]`` and labels ``[b, T]``."""
        index = torch.as_tensor(indices, dtype=torch.long)
        return self.normalised(self.pixels[index]), self.labels[index]

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> Images:
        """The same images with another normalisation."""
        return Images(self.pixels, self.labels, mean, std)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Float32, of mean 0 and standard deviation 1."""
        return (pixels.float() - self._mean) * self._scale


class AugmentedImages:
    """The same for training: mirrored with probability one half, and shifted by up to an eighth (the border is repeated).

    Args:
        images: what to draw from.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        self.labels = images.labels
        self._reach = images.pixels.shape[-1] // 8

    def __len__(self) -> int:
        return len(self.images)

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> AugmentedImages:
        """The same images with another normalisation."""
        return AugmentedImages(self.images.with_statistics(mean, std))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels = self.images.normalised(self.images.pixels[index])
        down, right = torch.randint(0, 2 * self._reach + 1, (2,)).tolist()
        padded = functional.pad(pixels.unsqueeze(0), [self._reach] * 4, mode="replicate").squeeze(0)
        height, width = pixels.shape[1:]
        shifted = padded[:, down : down + height, right : right + width]
        mirrored = bool(torch.randint(0, 2, ()))
        return (shifted.flip(2) if mirrored else shifted), self.images.labels[index]


def resized(pixels: Tensor, size: int) -> Tensor:
    """``[N, 3, size, size]``, uint8, bilinear with antialiasing."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    parts = [
        functional.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
        for part in pixels.split(512)
    ]
    return torch.cat([part.to(torch.uint8) for part in parts])
