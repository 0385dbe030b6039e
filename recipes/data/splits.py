"""Rows of a table in three disjoint splits."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..runtime.errors import DataError, OptionError

SPLITS = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def rows_by_column(values: Sequence[object], column: str, numbers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Rows of each split, from a column that says which one a row is of.

    Args:
        values: cells of the column.
        column: its name, for errors.
        numbers: of the rows in the table, for errors; from 0 on by default.

    Raises:
        DataError: another value, or a split without rows.
    """
    names = {alias: split for split, aliases in SPLITS.items() for alias in aliases}
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    for row, value in enumerate(values):
        split = names.get(str(value).strip().lower())
        if split is None:
            number = row if numbers is None else numbers[row]
            raise DataError(
                f"row {number} has {value!r} in the column {column!r}, expected train, validation or test. Pass another "
                "--split-column, or leave it out for random splits."
            )
        found[split].append(row)
    return _none_empty({split: torch.tensor(rows, dtype=torch.long) for split, rows in found.items()})


def rows_by_chance(
    images: Sequence[Hashable], validation_share: float, test_share: float, seed: int
) -> dict[str, Tensor]:
    """Rows of each split, drawn once for a seed. All rows of one image go into the same split.

    Args:
        images: of each row.
        validation_share, test_share: of the images.
        seed: of the draw.

    Raises:
        OptionError: shares that leave nothing to train.
        DataError: a split without rows.
    """
    if validation_share + test_share >= 1:
        raise OptionError(
            f"--validation-share {validation_share:g} and --test-share {test_share:g} leave nothing to train. Use less."
        )
    number = {image: index for index, image in enumerate(dict.fromkeys(images))}
    count = len(number)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    validation, test = round(count * validation_share), round(count * test_share)
    drawn = {"train": order[validation + test :], "validation": order[:validation], "test": order[validation:][:test]}
    own = torch.tensor([number[image] for image in images])
    if count == len(own):
        return _none_empty(drawn)
    return _none_empty({split: torch.nonzero(torch.isin(own, chosen)).squeeze(1) for split, chosen in drawn.items()})


def check_no_image_twice(images: Sequence[Hashable], rows: Mapping[str, Tensor]) -> None:
    """Raise DataError if an image is in two splits."""
    seen: dict[Hashable, str] = {}
    for split, own in rows.items():
        for row in own.tolist():
            if seen.setdefault(images[row], split) != split:
                raise DataError(
                    f"{images[row]} is in the {seen[images[row]]} and in the {split} split, so that results would be too "
                    "good. Give all rows of an image the same split."
                )


def _none_empty(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    for split, own in rows.items():
        if not len(own):
            counts = ", ".join(f"{len(other)} for {name}" for name, other in rows.items())
            raise DataError(f"the {split} split is empty: there are {counts} rows. Use more rows, or other splits.")
    return rows
