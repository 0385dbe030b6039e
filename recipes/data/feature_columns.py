"""Columns of a table to predict by: numbers, and categories."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import DataError, need

#: More different texts in a column than this are no categories.
MOST_CATEGORIES = 20
#: Squares of larger numbers have no finite sum.
_LARGEST = 1e100


def encoded_column(column: Any, name: str, place: str, option: str = "--inputs") -> dict[str, Tensor]:
    """A column without empty cells as numbers ``[N]``: texts become 0 and 1 for each category but the first.

    Args:
        column: of a data frame.
        name: of the column.
        place: of the frame, for messages.
        option: of the command line, by which the column can be left out.

    Raises:
        DataError: too many categories, or numbers that are not finite.
    """
    pandas = need("pandas")
    if pandas.api.types.is_numeric_dtype(column):
        return {name: numbers_of(column, name, place)}
    categories = sorted(map(str, column.unique()))
    if len(categories) > MOST_CATEGORIES:
        raise DataError(
            f"column {name} of {place} has {len(categories)} different texts, such as {categories[0]!r}: no more than "
            f"{MOST_CATEGORIES} can be categories. Leave it out with {option}, or write numbers."
        )
    texts = column.astype(str)
    return {
        f"{name}={category}": torch.as_tensor((texts == category).to_numpy(dtype=float)) for category in categories[1:]
    } or {name: torch.zeros(len(column), dtype=torch.float64)}


def numbers_of(column: Any, name: str, place: str) -> Tensor:
    """A column as numbers ``[N]``.

    Raises:
        DataError: a cell is no finite number.
    """
    numbers = need("pandas").to_numeric(column, errors="coerce").to_numpy(dtype=float)
    values = torch.as_tensor(numbers.copy())
    bad = torch.nonzero(~(values.abs() < _LARGEST)).flatten().tolist()
    if bad:
        found = column.iloc[bad[0]]
        shown = repr(found) if isinstance(found, str) else str(found)
        raise DataError(
            f"column {name} of {place} has {shown} in row {bad[0] + 1}. Write a finite number there, below {_LARGEST:g}."
        )
    return values
