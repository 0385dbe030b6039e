"""Where a set of labelled texts comes from: a folder or file of tables, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...runtime.errors import DataError, need
from ..splits import SPLITS

__all__ = ["load_source"]

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


def load_source(source: str) -> dict[str, Any]:
    """``train``, and ``validation`` and ``test`` where they are, as ``datasets.Dataset``.

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
        found = _of_hub(source)
    for name, split in found.items():
        if not len(split):
            raise DataError(f"the {name} split of {source} has no rows. Choose other data.")
    return found


def _of_folder(folder: Path) -> dict[str, Any]:
    files = {split: _files(folder, aliases) for split, aliases in _ALIASES.items()}
    if not files["train"]:
        there = sorted(path.name for path in folder.iterdir())
        shown = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "") if there else "nothing"
        raise DataError(
            f"found no training split in {folder}, which has {shown}. Expected train.parquet, train.csv, train.tsv, "
            "train.jsonl or train-*.parquet: rename the files, or pass the folder that has them."
        )
    return {split: _read(own) for split, own in files.items() if own}


def _files(folder: Path, aliases: Iterable[str]) -> list[Path]:
    for alias in aliases:
        for place in (folder, folder / "data"):
            for ending in _READERS:
                if files := sorted({*place.glob(f"{alias}{ending}"), *place.glob(f"{alias}-*{ending}")}):
                    return files
    return []


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


def _of_hub(source: str) -> dict[str, Any]:
    datasets = need("datasets")
    name, _, configuration = source.partition(":")
    try:
        found = datasets.load_dataset(name, configuration) if configuration else datasets.load_dataset(name)
    except Exception as error:  # of the network, the hub, or the data set: many kinds
        raise DataError(
            f"{source} is no folder or file here, and could not be loaded from the hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}). Use OWNER/NAME:CONFIGURATION, such as nyu-mll/glue:sst2; without a "
            "network, the folder of a copy."
        ) from error
    chosen = {}
    for split, aliases in _ALIASES.items():
        own = next((alias for alias in aliases if alias in found), None)
        if own is not None:
            chosen[split] = found[own]
    if "train" not in chosen:
        raise DataError(f"{source} has the splits {', '.join(found)}, and none for training. Choose other data.")
    return chosen


def _read(files: list[Path]) -> Any:
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
        raise DataError(
            f"{files[0]} cannot be read ({type(reason).__name__}: {' '.join(str(reason).split())[:300]}). Write it again."
        ) from error
