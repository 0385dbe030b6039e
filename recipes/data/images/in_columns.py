"""Images in the columns of a data set."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...runtime.errors import DataError, need
from .in_files import as_seen


def with_images(split: Any, column: str, place: str, decode: bool) -> Any:
    """The split with a column of images, also if whoever wrote the files did not note that.

    Raises:
        DataError: the column has something else.
    """
    try:
        return split.cast_column(column, need("datasets").Image(decode=decode))
    except Exception as error:  # of pyarrow and of datasets: many kinds
        raise DataError(
            f"column {column!r} of the {place} has no images ({type(error).__name__}: {error}). Choose other data."
        ) from error


def decoded_pixels(split: Any, column: str, place: str) -> Tensor:
    """``[N, 3, H, W]``, uint8, of images that all have the same size.

    Raises:
        DataError: an image that cannot be decoded, or of another size.
    """
    image = need("PIL.Image")
    encoded = with_images(split, column, place, decode=False)[column]
    arrays = []
    for row, entry in enumerate(encoded):
        try:
            source = io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"]
            with image.open(source) as opened:
                arrays.append(np.asarray(as_seen(opened)))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"row {row} of the {place} has no readable image ({error}).") from error
        if arrays[-1].shape != arrays[0].shape:
            raise DataError(
                f"row {row} of the {place} is an image of {arrays[-1].shape[:2]} pixels, the first one of "
                f"{arrays[0].shape[:2]}. Expected images of one size."
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


class HubImages:
    """Rows of a data set of the hub, decoded when they are needed.

    Args:
        split: with a column ``image``.
        rows: of the split.
        labels: ``[n, T]`` of these rows, NaN where one is missing.
        transform: from a PIL image to ``[3, H, W]``.
    """

    def __init__(self, split: Any, rows: Sequence[int], labels: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self._split = split
        self._rows = list(rows)
        self._labels = labels
        self._transform = transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self._rows[index]
        try:
            image = as_seen(self._split[row]["image"])
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(f"row {row} of the data has no readable image ({error}). Remove it.") from error
        return self._transform(image), self._labels[index]
