"""A table of one's own: paths of images, and label columns of which some cells may be empty."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import DataError, need
from ..runtime.tables import aligned
from .images.in_files import readable
from .label_columns import (
    MOST_CLASSES,
    check_columns,
    has_decimal_commas,
    is_missing,
    labels_of,
    without_constant_tasks,
)
from .splits import SPLITS, check_no_image_twice, rows_by_chance, rows_by_column
from .task_kinds import TaskKind

_SEPARATORS = (",", ";", "\t", "|")
#: Names such as id, image_id, PatientID and uuid.
_ID = re.compile(r"(?i:(^|[_\W])(id|uuid|guid)$)|[a-z]I[Dd]$")
_INDEX = re.compile(r"(unnamed: \d+(\.\d+)?|index|level_\d+)?", re.IGNORECASE)
#: Fewer different texts than this are always taken for classes.
_FEW_TEXTS = 10
#: Classes that the table of tasks tells apart.
_SHOWN_CLASSES = 4


@dataclass(frozen=True)
class OwnTable:
    """What the table has.

    Attributes:
        paths: of the images that can be read.
        kinds: of the tasks.
        labels: ``[N, T]``, NaN where one is missing.
        classes: names, of the tasks with classes.
        rows: of each split.
        left_out: columns that are no tasks, and why.
        skipped: number of images that cannot be read.
        about: what was found, for people.
    """

    paths: list[Path]
    kinds: dict[str, TaskKind]
    labels: Tensor
    classes: dict[str, tuple[str, ...]]
    rows: dict[str, Tensor]
    left_out: dict[str, str]
    skipped: int
    about: tuple[str, ...]


def read_own_table(options: argparse.Namespace) -> OwnTable:
    """Read the table of ``recipes.folder``, and find the kinds of its tasks.

    Args:
        options: of that command line.

    Raises:
        DataError: a table, columns, labels or images that cannot be used.
        OptionError: shares that leave nothing to train.
    """
    frame, separator = read_frame(Path(options.table), options.image_column)
    columns = [str(name) for name in frame.columns]
    frame.columns = columns
    others = [options.image_column, *([options.split_column] if options.split_column else [])]
    check_columns([*others, *options.tasks], columns, options.table)
    root = Path(options.images) if options.images else Path(options.table).parent
    paths = [root / str(path) for path in frame[options.image_column]]
    kept = readable(paths, options.check, options.strict)
    places = [f"row {row} ({frame[options.image_column].iloc[row]})" for row in kept]
    tasks = list(dict.fromkeys(options.tasks)) or [name for name in columns if name not in others]
    if not tasks:
        raise DataError(f"{options.table} has no column of labels beside {', '.join(others)}. Add one for each task.")
    found = read_labels(
        frame,
        tasks,
        named=bool(options.tasks),
        kinds=options.kind,
        missing=options.missing_value,
        kept=kept,
        places=places,
    )
    frame, unfit = frame.iloc[kept], found.unfit
    images = [paths[index] for index in kept]
    if options.split_column:
        rows = rows_by_column(frame[options.split_column].tolist(), options.split_column, kept)
        check_no_image_twice(images, rows)
    else:
        rows = rows_by_chance(images, options.validation_share, options.test_share, options.seed)
    kinds, labels, constant = without_constant_tasks(found.kinds, found.labels, rows["train"])
    classes = {task: names for task, names in found.classes.items() if task in kinds}
    about = [
        ", ".join(f"{len(own)} {name}" for name, own in rows.items())
        + f" images; {len(kinds)} tasks; {100 * (~torch.isnan(labels)).float().mean():.0f} % of the labels are there.",
        "",
        task_table(kinds, labels, classes),
    ]
    notes = [f"Columns are separated by {separator!r}."] if separator in (";", "|") else []
    notes += found.notes
    about += ["", *notes] if notes else []
    return OwnTable(images, kinds, labels, classes, rows, {**unfit, **constant}, len(paths) - len(kept), (*about, ""))


@dataclass(frozen=True)
class Labels:
    """What the label columns of a table have.

    Attributes:
        kinds: of the tasks, those of numbers without mean and spread.
        labels: ``[N, T]``, NaN where one is missing.
        classes: names, of the tasks with classes.
        unfit: columns that look like no labels, and why.
        notes: on how they were read, for people.
    """

    kinds: dict[str, TaskKind]
    labels: Tensor
    classes: dict[str, tuple[str, ...]]
    unfit: dict[str, str]
    notes: tuple[str, ...]


def read_labels(
    frame: Any,
    columns: Sequence[str],
    *,
    named: bool,
    kinds: Sequence[str],
    missing: Sequence[str],
    kept: Sequence[int],
    places: Sequence[str],
) -> Labels:
    """Find which columns can be labels, and of which kind.

    Args:
        frame: all rows.
        columns: that may be labels.
        named: they are the user's choice; otherwise those that look like no labels are left out.
        kinds: given ones, as ``COLUMN=KIND``.
        missing: texts that stand for a missing label.
        kept: the N rows that are used.
        places: where they are, for errors.

    Raises:
        DataError: columns or labels that cannot be used, or fewer than two columns.
    """
    chosen = _kinds(kinds, columns)
    unfit = {} if named else _unfit(frame, columns, missing, chosen)
    tasks = [task for task in columns if task not in unfit]
    if unfit and len(tasks) < 2:
        raise DataError(f"only {len(tasks)} column(s) can be tasks, and relations need two. {_told(unfit)}")
    cells = {task: frame[task].iloc[list(kept)].tolist() for task in tasks}
    found = {task: labels_of(task, own, chosen.get(task), missing, places) for task, own in cells.items()}
    _check_no_split(cells)
    commas = [task for task, own in cells.items() if has_decimal_commas(own, missing)]
    notes = [f"Read with decimal commas: {', '.join(commas)}."] if commas else []
    return Labels(
        {task: kind for task, (kind, _, _) in found.items()},
        torch.stack([labels for _, labels, _ in found.values()], dim=1),
        {task: names for task, (_, _, names) in found.items() if names},
        unfit,
        (*notes, _told(unfit)) if unfit else tuple(notes),
    )


def task_table(kinds: Mapping[str, TaskKind], labels: Tensor, classes: Mapping[str, Sequence[str]]) -> str:
    """Name, kind, number of labels and their distribution, a line for each task.

    Args:
        kinds: of the tasks.
        labels: ``[N, T]``, NaN where one is missing.
        classes: names, of the tasks with classes.
    """
    rows = [["task", "kind", "labels", "values"]]
    for (task, kind), column in zip(kinds.items(), labels.unbind(1)):
        own = column[~torch.isnan(column)]
        if kind.name == "binary":
            described, values = "binary", f"{100 * own.mean():.0f} % positive"
        elif kind.name == "number":
            described, values = "number", f"{own.min():.4g} to {own.max():.4g}, mean {own.mean():.4g}"
        else:
            described = f"{kind.classes} classes"
            counts = sorted(
                zip(own.long().bincount(minlength=kind.classes).tolist(), classes[task]), key=lambda x: -x[0]
            )
            shares = [f"{name} {100 * count / len(own):.0f} %" for count, name in counts]
            values = ", ".join(shares[:_SHOWN_CLASSES] + ["..."] * (len(shares) > _SHOWN_CLASSES))
        rows.append([task, described, str(len(own)), values])
    return aligned(rows, left=4)


def _told(unfit: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{name!r} ({why})" for name, why in unfit.items())
    return (
        f"Left out, since they look like no labels: {reasons}. Name the columns to be learned after --tasks otherwise."
    )


def _unfit(frame: Any, tasks: Sequence[str], missing: Sequence[str], chosen: Mapping[str, str]) -> dict[str, str]:
    found = {task: why_no_labels(task, frame[task].tolist(), missing) for task in tasks if task not in chosen}
    return {task: why for task, why in found.items() if why is not None}


def why_no_labels(name: str, values: Sequence[Any], missing: Sequence[str]) -> str | None:
    """Say why a column looks like an id, a number of rows, or texts; ``None`` if it does not."""
    texts = [str(value).strip() for value in values if not is_missing(value, missing)]
    different = len(set(texts))
    numbers = [_number(text) for text in texts]
    if all(number is not None and number.is_integer() for number in numbers):
        known = [number for number in numbers if number is not None]
        in_a_row = different > _FEW_TEXTS and max(known) - min(known) == different - 1
        if different == len(texts) and (in_a_row or _INDEX.fullmatch(name)):
            return "counts the rows"
    elif None not in numbers:
        return None
    elif different > max(_FEW_TEXTS, len(texts) / 2):
        return f"{different} different texts in {len(texts)} rows"
    if _ID.search(name) and different > MOST_CLASSES:
        return f"an id by its name, with {different} different values"
    return None


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ".", 1))
    except ValueError:
        return None


def read_frame(path: Path, column: str) -> tuple[Any, str | None]:
    """Read a CSV, TSV or parquet file; texts stay as they are.

    Args:
        path: of the file.
        column: one that tells the separator of a CSV.

    Returns:
        A ``pandas.DataFrame``, and the separator if it has one.

    Raises:
        DataError: no such file, of another kind, without rows, with a column twice, or one that cannot be read.
    """
    pandas = need("pandas")
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no file"
        raise DataError(f"found {found} {path}. Pass the path of a .csv or .parquet file.")
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet"):
        raise DataError(
            f"{path} ends in {kind or 'nothing'}, expected .csv, .tsv or .parquet. Save the table as one of them."
        )
    separator = None
    try:
        if kind == ".parquet":
            frame = pandas.read_parquet(path)
        else:
            separator = "\t" if kind == ".tsv" else _separator_of(path, column)
            # All as texts: pandas would take the path 001 for a number, and the class None for a missing label.
            # Without header: pandas would rename what is there twice, and take surplus cells of the first row for an index.
            cells = pandas.read_csv(
                path, sep=separator, dtype=str, keep_default_na=False, header=None, encoding="utf-8-sig"
            )
            frame = cells.iloc[1:].reset_index(drop=True)
            frame.columns = [name or f"Unnamed: {place}" for place, name in enumerate(cells.iloc[0])]
    except Exception as error:  # of pandas and pyarrow: many kinds
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    if twice := frame.columns[frame.columns.duplicated()].tolist():
        raise DataError(f"{path} has the column {twice[0]!r} twice. Give each column a name of its own.")
    if not len(frame):
        raise DataError(f"{path} has no rows. Choose another table.")
    return frame, separator


def of_texts(texts: Any, names: bool) -> Any:
    """The numbers of a column, of which empty cells and NA are none; where others are no numbers, its texts.

    Args:
        texts: a column of ``read_frame``.
        names: whether 001 and 1 are different.
    """
    plain = texts.str.strip().fillna("")
    empty = plain == ""
    known = plain[~empty & ~plain.str.lower().isin(("na", "nan"))]
    numbers = need("pandas").to_numeric(known, errors="coerce")
    if numbers.isna().any() or not len(known) or (names and (numbers.astype(str) != known).any()):
        return texts.mask(empty)
    return numbers.reindex(texts.index)


def _separator_of(path: Path, image_column: str) -> str:
    """The one that sets the column of paths apart in the first line; otherwise the one that occurs most."""
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline()
    cells = {own: [cell.strip(' "\n') for cell in header.split(own)] for own in _SEPARATORS if own in header}
    found = [own for own, names in cells.items() if image_column in names]
    return found[0] if found else max(_SEPARATORS, key=header.count)


def _check_no_split(cells: Mapping[str, Sequence[Any]]) -> None:
    names = {alias for aliases in SPLITS.values() for alias in aliases}
    for task, own in cells.items():
        if {str(value).strip().lower() for value in own} <= names:
            raise DataError(
                f"column {task!r} says train, validation or test, and is no task. Use --split-column {task}, or name the "
                "label columns after --tasks."
            )


def _kinds(given: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        task, equals, kind = text.rpartition("=")
        if not equals or kind not in ("binary", "classes", "number"):
            raise DataError(f"found --kind {text}. Pass COLUMN=binary, COLUMN=classes or COLUMN=number.")
        check_columns([task], tasks, "the list of tasks")
        found[task] = kind
    return found
