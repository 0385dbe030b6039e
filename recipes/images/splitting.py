"""Rows of a table in three disjoint splits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError, OptionError

__all__ = ["SPLITS", "rows_by_column", "rows_by_chance"]

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
                f"row {number} has {value!r} in the column {column!r}, expected train, validation or test. Type another "
                "--split-column, or leave it out for random splits."
            )
        found[split].append(row)
    return _none_empty({split: torch.tensor(rows, dtype=torch.long) for split, rows in found.items()})


def rows_by_chance(count: int, validation_share: float, test_share: float, seed: int) -> dict[str, Tensor]:
    """Rows of each split, drawn once for a seed.

    Raises:
        OptionError: shares that leave nothing to train.
        DataError: a split without rows.
    """
    if validation_share + test_share >= 1:
        raise OptionError(
            f"--validation-share {validation_share:g} and --test-share {test_share:g} leave nothing to train. Type less."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    validation, test = round(count * validation_share), round(count * test_share)
    return _none_empty(
        {"train": order[validation + test :], "validation": order[:validation], "test": order[validation:][:test]}
    )


def _none_empty(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    for split, own in rows.items():
        if not len(own):
            counts = ", ".join(f"{len(other)} for {name}" for name, other in rows.items())
            raise DataError(f"the {split} split is empty: there are {counts} rows. Use more rows, or other splits.")
    return rows
