"""The handwritten digits of scikit-learn as ten one-vs-rest tasks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.errors import need
from .sources import Examples, Splits
from .task_kinds import BINARY

DIGIT_TASKS = tuple(str(digit) for digit in range(10))
TEST_IMAGES = 797


def digit_splits(
    seed: int, train_per_class: int, validation_per_class: int, dtype: torch.dtype = torch.float32
) -> Splits:
    """Digits of scikit-learn, with as many training and validation images of every class.

    The test images are the same for every seed. A hyper-parameter that was chosen with one seed has therefore never
    seen the test images of another.

    Raises:
        ValueError: more images per class than there are.
    """
    most = most_per_class()
    if train_per_class + validation_per_class > most:
        raise ValueError(
            f"there are {most} images of the rarest class outside the test set, but {train_per_class} for training and "
            f"{validation_per_class} for validation were asked for."
        )
    images, digits, pool, test = _digits()
    generator = torch.Generator().manual_seed(seed)
    train: list[int] = []
    validation: list[int] = []
    for digit in range(10):
        rows = pool[digits[pool] == digit]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        train += rows[:train_per_class].tolist()
        validation += rows[train_per_class : train_per_class + validation_per_class].tolist()

    def examples(rows: list[int]) -> Examples:
        labels = torch.nn.functional.one_hot(digits[rows], 10).to(dtype)
        return Examples(images[rows].to(dtype), labels, tuple(rows))

    return Splits(dict.fromkeys(DIGIT_TASKS, BINARY), examples(train), examples(validation), examples(test.tolist()))


def unused_digits(splits: Splits) -> Tensor:
    """Images ``[N, 1, 8, 8]`` that are in none of these splits."""
    images, _, _, _ = _digits()
    used = [row for part in (splits.train, splits.validation, splits.test) for row in part.rows]
    left = torch.ones(len(images), dtype=torch.bool)
    left[used] = False
    return images[left].to(splits.train.inputs)


def most_per_class() -> int:
    """Images of the rarest class that are left for training and validation together."""
    _, digits, pool, _ = _digits()
    return int(digits[pool].bincount(minlength=10).min())


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[N, 1, 8, 8]`` in ``[-1, 1]``, their digits, the rows outside the test set, and those of the test set."""
    bunch = need("sklearn.datasets").load_digits()
    digits = torch.from_numpy(bunch.target).long()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1  # pixels go from 0 to 16
    pool, test = need("sklearn.model_selection").train_test_split(
        range(len(digits)), test_size=TEST_IMAGES, stratify=digits.numpy(), random_state=0
    )
    return images, digits, torch.tensor(sorted(pool)), torch.tensor(sorted(test))
