"""Data sets of the Hugging Face hub, or local parquet files of the same schema, and whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..runtime.errors import DataError, need


def load_splits(data: str, names: Sequence[str], subset: str | None = None) -> dict[str, Any]:
    """The named splits as ``datasets.Dataset``.

    Args:
        data: an existing folder with files such as ``train.parquet`` or ``train-00000-of-00001.parquet`` (also in its
            folder ``data``), or else the id of a data set on the hub.
        names: of the splits.
        subset: of a data set on the hub that has several.

    Raises:
        DataError: nothing there, a split is missing, or files that cannot be read.
    """
    datasets = need("datasets")
    folder = Path(data)
    if not folder.exists():
        if data.startswith((".", "/", "~")) or data.count("/") != 1 or folder.parent.is_dir():
            raise DataError(
                f"found no folder {data}. Pass the folder of parquet files, or the id of a data set on the hub."
            )
        try:
            found = datasets.load_dataset(data) if subset is None else datasets.load_dataset(data, subset)
        except Exception as error:  # of the network, the hub, or the data set: many kinds
            raise DataError(
                f"{data} is no folder here, and could not be loaded from the hub ({type(error).__name__}: {error}). Without "
                "a network, use --data with a folder of its parquet files."
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


def has_split(data: str, name: str) -> bool:
    """Whether a folder has files of a split; a data set on the hub is taken to have it."""
    folder = Path(data)
    return not folder.exists() or bool(_found(folder, name))


def fingerprint_of(*tensors: Tensor, texts: Sequence[str] = ()) -> str:
    """Twelve hexadecimal digits that change with any of the values, texts, or their order."""
    digest = hashlib.sha256("\n".join(texts).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _split(found: Any, name: str, data: str) -> Any:
    if name not in found:
        raise DataError(f"{data} has the splits {', '.join(found)}, expected {name!r}. Choose other data.")
    return found[name]


def _files(folder: Path, name: str) -> list[Path]:
    if files := _found(folder, name):
        return files
    raise DataError(f"found no {name}.parquet and no {name}-*.parquet in {folder}. Pass the folder that has them.")


def _found(folder: Path, name: str) -> list[Path]:
    for place in (folder, folder / "data"):
        files = sorted({*place.glob(f"{name}.parquet"), *place.glob(f"{name}-*.parquet")})
        if files:
            return files
    return []
