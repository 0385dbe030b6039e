"""Columns of a table as features: numbers in standard units of the training rows, and categories as 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import DataError, need
from ..feature_columns import MOST_CATEGORIES, encoded_column
from ..label_columns import has_decimal_commas
from ..own_table import of_texts, why_no_labels

#: What an empty cell of a column of categories is.
_EMPTY = "(empty)"


@dataclass(frozen=True)
class Features:
    """Features as the table has them.

    Attributes:
        names: of D features; categories but the first of each column are ``"column=category"``.
        values: ``[N, D]`` float64; NaN where a number is missing.
        left_out: columns that are of no use, and why.
    """

    names: tuple[str, ...]
    values: Tensor
    left_out: Mapping[str, str]

    def standardised(self, train: Tensor) -> Tensor:
        """``[N, D + M]``: of mean 0 and standard deviation 1 over the training rows, and whether each of M is missing.

        A missing number is the mean of the training rows, and 1 in one more feature for each column with missing numbers:
        that a value is missing may say something, and the mean alone would hide it.

        Args:
            train: training rows.
        """
        missing = torch.isnan(self.values)
        columns = torch.cat([self.values, missing[:, missing.any(0)].double()], dim=1)
        known = columns[train]
        count = (~torch.isnan(known)).sum(0).clamp(min=1)
        mean = known.nan_to_num().sum(0) / count
        spread = ((known - mean).nan_to_num().square().sum(0) / count).sqrt()
        scaled = (columns - mean) / torch.where(spread > 0, spread, torch.ones_like(spread))
        return scaled.nan_to_num().float()


def read_features(frame: Any, columns: Sequence[str], *, named: bool, place: str) -> Features:
    """Turn columns into numbers.

    Args:
        frame: rows.
        columns: which.
        named: they are the user's choice; otherwise those that look like ids or texts are left out.
        place: of the frame, for messages.

    Raises:
        DataError: texts that are no categories, numbers that are not finite, two features of one name, or no feature.
    """
    found: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name in columns:
        column = _typed(frame[name])
        if not named and (why := _why_no_feature(name, column)) is not None:
            left_out[name] = why
            continue
        own = _encoded_with_gaps(column, name, place)
        if both := found.keys() & own.keys():
            raise DataError(f"two features of {place} would be called {min(both)}: column and category. Rename one.")
        varied = {feature: values for feature, values in own.items() if _varies(values)}
        if not varied:
            left_out[name] = "the same in all rows"
        found.update(varied)
    if not found:
        reasons = "; ".join(f"{name!r} ({why})" for name, why in left_out.items())
        raise DataError(f"{place} has no column of features that can be used: {reasons}. Name others after --features.")
    return Features(tuple(found), torch.stack(list(found.values()), dim=1), left_out)


def _typed(column: Any) -> Any:
    """Numbers, where all cells are such; otherwise texts."""
    pandas = need("pandas")
    if pandas.api.types.is_numeric_dtype(column):
        return column.astype(float)
    texts = column.map(lambda cell: None if cell is None or cell != cell else str(cell))
    if has_decimal_commas(texts.tolist()):
        texts = texts.str.replace(",", ".")
    return of_texts(texts, names=False)


def _encoded_with_gaps(column: Any, name: str, place: str) -> dict[str, Tensor]:
    gaps = column.isna()
    if not need("pandas").api.types.is_numeric_dtype(column):
        return encoded_column(column.fillna(_EMPTY), name, place, "--features")
    values = encoded_column(column.fillna(0.0), name, place, "--features")[name]
    return {name: values.masked_fill(torch.as_tensor(gaps.to_numpy(dtype=bool).copy()), torch.nan)}


def _why_no_feature(name: str, column: Any) -> str | None:
    cells = column.tolist()
    if (why := why_no_labels(name, cells, ())) is not None:
        return why
    categories = column.nunique()
    if need("pandas").api.types.is_numeric_dtype(column) or categories <= MOST_CATEGORIES:
        return None
    return f"{categories} different texts, more than {MOST_CATEGORIES} categories"


def _varies(values: Tensor) -> bool:
    known = values[~torch.isnan(values)]
    # Whether a number is there may tell something, where the number does not.
    return bool(len(known)) and (len(known) < len(values) or bool((known != known[0]).any()))
