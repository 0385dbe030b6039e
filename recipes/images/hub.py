"""Data sets of the Hugging Face hub, or local parquet files of the same schema."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..extras import need

__all__ = ["decoded_pixels", "load_splits", "with_images"]


def load_splits(data: str, names: Sequence[str]) -> dict[str, Any]:
    """The named splits as ``datasets.Dataset``.

    Args:
        data: an existing folder with files such as ``train.parquet`` or ``train-00000-of-00001.parquet`` (also in its
            folder ``data``), or else the id of a data set on the hub.
        names: of the splits.

    Raises:
        DataError: nothing there, a split is missing, or files that cannot be read.
    """
    datasets = need("datasets")
    folder = Path(data)
    if not folder.exists():
        if data.startswith((".", "/", "~")) or data.count("/") != 1 or folder.parent.is_dir():
            raise DataError(
                f"found no folder {data}. Type the folder of parquet files, or the id of a data set on the hub."
            )
        try:
            found = datasets.load_dataset(data)
        except Exception as error:  # of the network, the hub, or the data set: many kinds
            raise DataError(
                f"{data} is no folder here, and could not be loaded from the hub ({type(error).__name__}: {error}). Without "
                "a network, type --data with a folder of its parquet files."
            ) from error
        return {name: _split(found, name, data) for name in names}
    files = {name: _files(folder, name) for name in names}
    try:
        found = datasets.load_dataset("parquet", data_files={name: list(map(str, own)) for name, own in files.items()})
    except Exception as error:  # of pyarrow and of datasets: many kinds
        reason = error.__cause__ or error  # datasets says only that there is one
        raise DataError(
            f"the parquet files in {data} cannot be read ({type(reason).__name__}: {reason}). Download them again."
        ) from error
    return {name: _split(found, name, data) for name in names}


def _split(found: Any, name: str, data: str) -> Any:
    if name not in found:
        raise DataError(f"{data} has the splits {', '.join(found)}, expected {name!r}. Choose other data.")
    return found[name]


def _files(folder: Path, name: str) -> list[Path]:
    for place in (folder, folder / "data"):
        files = sorted({*place.glob(f"{name}.parquet"), *place.glob(f"{name}-*.parquet")})
        if files:
            return files
    raise DataError(f"found no {name}.parquet and no {name}-*.parquet in {folder}. Type the folder that has them.")


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
                arrays.append(np.asarray(opened.convert("RGB")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"row {row} of the {place} has no readable image ({error}).") from error
        if arrays[-1].shape != arrays[0].shape:
            raise DataError(
                f"row {row} of the {place} is an image of {arrays[-1].shape[:2]} pixels, the first one of "
                f"{arrays[0].shape[:2]}. Expected images of one size."
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
