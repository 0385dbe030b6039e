"""Tables of folders and files, or data sets of the Hugging Face hub, split by split, and whether they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..runtime.errors import DataError, need
from .splits import SPLITS

#: Ending of a file, to what reads it and its options.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    # "null" and "NA" are texts; only an empty cell is missing.
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".tsv": ("csv", {"keep_default_na": False, "na_values": [""], "sep": "\t"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
}
_SPLIT_COLUMN = "split"
#: MultiNLI has two of each: those of the kinds of text that it was trained on are taken.
_ALIASES = {
    "train": SPLITS["train"],
    "validation": (*SPLITS["validation"], "validation_matched"),
    "test": (*SPLITS["test"], "test_matched"),
}


def load_splits(
    data: str, names: Sequence[str], subset: str | None = None, optional: Sequence[str] = ()
) -> dict[str, Any]:
    """Load the named splits of parquet files, or of the hub, as ``datasets.Dataset``.

    Args:
        data: an existing folder with files such as ``train.parquet`` or ``train-00000-of-00001.parquet`` (also in its
            folder ``data``), or else the id of a data set on the hub.
        names: of the splits.
        subset: of a data set on the hub that has several.
        optional: names of splits that may be missing.

    Raises:
        DataError: nothing there, a split is missing, or files that cannot be read.
    """
    folder = Path(data)
    if folder.exists():
        files = {name: _files(folder, (name,), (".parquet",)) for name in (*names, *optional)}
        for name in names:
            if not files[name]:
                raise DataError(
                    f"found no {name}.parquet and no {name}-*.parquet in {folder}. Pass the folder that has them."
                )
        return {name: _read(own) for name, own in files.items() if own}
    if data.startswith((".", "/", "~")) or data.count("/") != 1 or folder.parent.is_dir():
        raise DataError(
            f"found no folder {data}. Pass the folder of parquet files, or the id of a data set on the hub."
        )
    found = _from_hub(data, subset, "Without a network, use --data with a folder of its parquet files.")
    for name in names:
        if name not in found:
            raise DataError(f"{data} has the splits {', '.join(found)}, expected {name!r}. Choose other data.")
    return {name: found[name] for name in (*names, *optional) if name in found}


def load_tables(source: str) -> dict[str, Any]:
    """Load ``train``, and ``validation`` and ``test`` where they are, by any of their usual names, as ``datasets.Dataset``.

    Args:
        source: a folder with ``train.csv`` and ``validation.csv`` or the like (parquet, CSV, TSV, JSON lines; also
            ``train-00000-of-00001.parquet``, and in its folder ``data``); a file with a column ``split``; or the id of a
            data set on the hub, with a configuration behind a colon: ``nyu-mll/glue:sst2``.

    Raises:
        DataError: nothing there, no training split, or files that cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _of_folder(path)
    elif path.is_file():
        found = _of_file(path)
    elif source.startswith((".", "/", "~")) or path.suffix.lower() in _READERS:
        raise DataError(
            f"found no folder and no file {source}. Pass one that is there, or the id of a data set on the hub."
        )
    else:
        name, _, subset = source.partition(":")
        advice = "Use OWNER/NAME:CONFIGURATION, such as nyu-mll/glue:sst2; without a network, the folder of a copy."
        found = _of_hub(source, _from_hub(name, subset or None, advice))
    for name, split in found.items():
        if not len(split):
            raise DataError(f"the {name} split of {source} has no rows. Choose other data.")
    return found


def _of_folder(folder: Path) -> dict[str, Any]:
    files = {split: _files(folder, aliases, tuple(_READERS)) for split, aliases in _ALIASES.items()}
    if not files["train"]:
        there = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "") if there else "nothing"
        raise DataError(
            f"found no training split in {folder}, which has {shown}. Expected train.parquet, train.csv, train.tsv, "
            "train.jsonl or train-*.parquet: rename the files, or pass the folder that has them."
        )
    return {split: _read(own) for split, own in files.items() if own}


def _of_file(path: Path) -> dict[str, Any]:
    table = _read([path])
    if _SPLIT_COLUMN not in table.column_names:
        raise DataError(
            f"{path} has the columns {', '.join(table.column_names)}, and nothing says which rows are for training. Add a "
            f"column {_SPLIT_COLUMN!r} with train, validation and test, or pass a folder with train and validation files."
        )
    rows: dict[str, list[int]] = {split: [] for split in _ALIASES}
    names = {alias: split for split, aliases in _ALIASES.items() for alias in aliases}
    for row, value in enumerate(table[_SPLIT_COLUMN]):
        split = names.get(str(value).strip().lower())
        if split is None:
            raise DataError(f"row {row} of {path} has the split {value!r}. Write train, validation or test.")
        rows[split].append(row)
    if not rows["train"]:
        raise DataError(f"{path} has no row whose split is train. Write train for those to learn from.")
    return {split: table.select(own) for split, own in rows.items() if own}


def _of_hub(source: str, found: Mapping[str, Any]) -> dict[str, Any]:
    names = {split: next((alias for alias in own if alias in found), None) for split, own in _ALIASES.items()}
    if names["train"] is None:
        raise DataError(f"{source} has the splits {', '.join(found)}, and none for training. Choose other data.")
    return {split: found[name] for split, name in names.items() if name is not None}


def _from_hub(name: str, subset: str | None, advice: str) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = need("datasets").load_dataset(name, *([] if subset is None else [subset]))
    except Exception as error:  # of the network, the hub, or the data set: many kinds
        raise DataError(
            f"{name} is no folder or file here, and could not be loaded from the hub ({_said(error)}). {advice}"
        ) from error
    return found


def _files(folder: Path, names: Sequence[str], endings: Sequence[str]) -> list[Path]:
    for name in names:
        for place in (folder, folder / "data"):
            for ending in endings:
                if files := sorted({*place.glob(f"{name}{ending}"), *place.glob(f"{name}-*{ending}")}):
                    return files
    return []


def _read(files: Sequence[Path]) -> Any:
    kind, options = _READERS.get(files[0].suffix.lower(), ("", {}))
    if not kind:
        raise DataError(
            f"{files[0]} ends in {files[0].suffix or 'nothing'}, expected one of {', '.join(_READERS)}. Save it as such."
        )
    try:
        # One split at a time: another one may have other columns, or no labels.
        return need("datasets").load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
    except Exception as error:  # of pandas, pyarrow and datasets: many kinds
        reason = error.__cause__ or error  # datasets says only that there is one
        raise DataError(f"{files[0]} cannot be read ({_said(reason)}). Write or download it again.") from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def fingerprint_of(*tensors: Tensor, texts: Sequence[str] = ()) -> str:
    """Twelve hexadecimal digits that change with any of the values, texts, or their order."""
    digest = hashlib.sha256("\n".join(texts).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
