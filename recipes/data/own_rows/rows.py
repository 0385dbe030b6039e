"""Which columns of a table are inputs and which are labels, and its rows in three splits."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import DataError, need
from ..hub import fingerprint_of
from ..images.in_files import readable
from ..label_columns import check_columns, is_missing
from ..own_table import Labels, read_frame, read_labels, task_table
from ..splits import SPLITS, check_no_image_twice, rows_by_chance, rows_by_column
from ..task_kinds import TaskKind
from .features import Features, read_features

INPUTS = ("image", "text", "features")
#: With fewer, a fifth of the rows tells nothing.
LEAST_ROWS = 50
#: Of a label column: known labels, and those of the second most frequent class. A fifth of them is in a test split.
LEAST_LABELS, LEAST_OF_CLASS = 20, 5
#: Of the cells of a column, that are looked at to find out whether they are paths of images.
_PATHS_LOOKED_AT = 20


@dataclass(frozen=True)
class Columns:
    """What the user says of a table.

    Attributes:
        table: path of a CSV, TSV or parquet file.
        image, text: a column, if the inputs are such.
        features: columns; empty for all that are no labels; ``None`` if the inputs are others.
        images: folder in which paths of images begin; by default that of the table.
        tasks: label columns; by default all others that can be.
        kind: of tasks, as ``COLUMN=KIND``.
        missing_value: texts that stand for a missing label.
        split_column: says train, validation or test of each row.
    """

    table: str
    image: str | None = None
    text: str | None = None
    features: tuple[str, ...] | None = None
    images: str | None = None
    tasks: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    missing_value: tuple[str, ...] = ()
    split_column: str | None = None


@dataclass(frozen=True)
class OwnRows:
    """What the table has.

    Attributes:
        form: of the inputs: ``"image"``, ``"text"`` or ``"features"``.
        columns: of the inputs.
        inputs: N paths, N texts, or features.
        kinds: of the tasks; errors of numbers are in standard deviations of all their labels.
        labels: ``[N, T]``, NaN where one is missing.
        classes: names, of the tasks with classes.
        rows: of each split, if a column gives them.
        left_out: columns that are neither, and why.
        notes: on what was found, for people.
    """

    form: str
    columns: tuple[str, ...]
    inputs: tuple[Path, ...] | tuple[str, ...] | Features
    kinds: Mapping[str, TaskKind]
    labels: Tensor
    classes: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, Tensor] | None
    left_out: Mapping[str, str]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, seed: int, validation_share: float, test_share: float) -> Mapping[str, Tensor]:
        """Rows of each split: those of the column, or drawn for the seed, rows of one image or text together.

        Raises:
            OptionError, DataError: shares that leave a split without rows.
        """
        if self.rows is not None:
            return self.rows
        # Equal features say little about whether two rows are of the same thing.
        same = range(len(self)) if isinstance(self.inputs, Features) else self.inputs
        return rows_by_chance(same, validation_share, test_share, seed)

    def kinds_of(self, train: Tensor) -> dict[str, TaskKind]:
        """The kinds with mean and spread of the labels of these rows, for models that predict numbers in such units."""
        found = {}
        for (task, kind), column in zip(self.kinds.items(), self.labels[train].double().unbind(1)):
            known = column[~torch.isnan(column)]
            varies = len(known) > 1 and float(known.std()) > 0
            if kind.name == "number" and varies:
                kind = TaskKind("number", mean=float(known.mean()), spread=float(known.std()), unit=kind.unit)
            found[task] = kind
        return found

    @property
    def fingerprint(self) -> str:
        """Of all that a training reads."""
        given = [] if self.rows is None else [self.rows[name] for name in SPLITS]
        if isinstance(self.inputs, Features):
            return fingerprint_of(self.labels, self.inputs.values, *given, texts=[*self.kinds, *self.inputs.names])
        if self.form == "text":
            return fingerprint_of(self.labels, *given, texts=[*self.kinds, *map(str, self.inputs)])
        files = [f"{Path(path).name} {Path(path).stat().st_size}" for path in self.inputs]
        return fingerprint_of(self.labels, *given, texts=[*self.kinds, *files])

    @property
    def about(self) -> str:
        """What was found, in lines for people."""
        share = 100 * float((~torch.isnan(self.labels)).float().mean())
        what = f"{len(self.inputs.names)} features" if isinstance(self.inputs, Features) else f"the {self.form}"
        lines = [
            f"{len(self)} rows; {what} of {_listed(self.columns)}; {len(self.kinds)} tasks; {share:.0f} % of labels."
        ]
        return "\n".join([*lines, "", task_table(self.kinds, self.labels, self.classes), *self.notes])


@functools.lru_cache(maxsize=2)
def read_rows(columns: Columns) -> OwnRows:
    """Read a table.

    Raises:
        DataError: a table, columns, labels, texts, features or images that cannot be used.
    """
    place = columns.table
    _check_one_form(columns)
    first = columns.image or columns.text or next(iter(columns.features or columns.tasks), "")
    frame, _ = read_frame(Path(place), first)
    frame.columns = names = [str(name) for name in frame.columns]
    root = Path(columns.images) if columns.images else Path(place).parent
    if columns.image is None and columns.text is None and columns.features is None:
        columns = _with_image_column(columns, frame, root)
    form = "image" if columns.image else "text" if columns.text else "features"
    inputs = tuple(columns.features or ()) if form == "features" else (str(columns.image or columns.text),)
    further = [columns.split_column] if columns.split_column else []
    check_columns([*inputs, *further, *columns.tasks], names, place)
    _check_apart(inputs, columns, place)
    others = [*inputs, *further]
    tasks = list(dict.fromkeys(columns.tasks)) or [name for name in names if name not in others]
    if form == "features" and not inputs:
        inputs = tuple(name for name in names if name not in (*tasks, *further))
    if not inputs or not tasks:
        raise DataError(
            f"{place} has the columns {_listed(names)}, and {_listed(inputs or tasks)} leave none for the "
            f"{'labels' if inputs else 'features'}. Name the columns of the features after --features, or those of the "
            "labels after --tasks."
        )
    read, kept = _inputs(form, inputs, bool(columns.features), frame, root, place)
    labels = read_labels(
        frame,
        tasks,
        named=bool(columns.tasks),
        kinds=columns.kind,
        missing=columns.missing_value,
        kept=kept,
        places=[f"row {row + 1}" for row in kept],
    )
    if len(kept) < LEAST_ROWS:
        raise DataError(
            f"{place} has {len(kept)} rows that can be used, and a comparison needs {LEAST_ROWS} at least: with fewer, a "
            "test split could not tell methods apart. Add rows."
        )
    kinds, columns_kept, useless = _learnable(labels, named=bool(columns.tasks), place=place)
    of_inputs = dict(read.left_out) if isinstance(read, Features) else {}
    rows = None
    if columns.split_column:
        rows = rows_by_column(frame[columns.split_column].iloc[kept].tolist(), columns.split_column, kept)
        if not isinstance(read, Features):
            check_no_image_twice(read, rows)
    notes = list(labels.notes)
    if left := {**of_inputs, **useless}:
        notes.append(f"Left out: {'; '.join(f'{name!r} ({why})' for name, why in left.items())}.")
    if len(kept) < len(frame):
        notes.append(f"Left out: {len(frame) - len(kept)} rows whose images cannot be read.")
    classes = {task: own for task, own in labels.classes.items() if task in kinds}
    left_out = {**labels.unfit, **left}
    return OwnRows(form, inputs, read, kinds, labels.labels[:, columns_kept], classes, rows, left_out, tuple(notes))


def _check_one_form(columns: Columns) -> None:
    given = [f"--{name}" for name in INPUTS if getattr(columns, name) is not None]
    if len(given) > 1:
        raise DataError(f"found {' and '.join(given)}: the inputs are images, texts or features. Use one of them.")


def _check_apart(inputs: Sequence[str], columns: Columns, place: str) -> None:
    roles = {"an input": inputs, "a label": columns.tasks, "the split": (columns.split_column,)}
    for name in dict.fromkeys((*inputs, *columns.tasks)):
        if len(own := [role for role, members in roles.items() if name in members]) > 1:
            raise DataError(
                f"column {name!r} of {place} was named as {' and as '.join(own)}. It can be one thing only: leave it "
                "out of the others."
            )


def _with_image_column(columns: Columns, frame: Any, root: Path) -> Columns:
    others = (*columns.tasks, columns.split_column)
    names = [name for name in frame.columns if name not in others]
    found = [name for name in names if _has_images(frame[name], root)]
    if len(found) != 1:
        why = (
            f"the columns {_listed(found)} all have paths of images" if found else "no column has paths of images here"
        )
        raise DataError(
            f"{columns.table} has the columns {_listed(list(frame.columns))}, and {why}, so it is not clear what to predict "
            "from. Pass one of --image COLUMN (of paths), --text COLUMN, --features COLUMN ... (of numbers and categories)."
        )
    return Columns(**{**vars(columns), "image": found[0]})


def _has_images(column: Any, root: Path) -> bool:
    cells = [str(cell) for cell in column.tolist() if not is_missing(cell)][:_PATHS_LOOKED_AT]
    endings = need("PIL.Image").registered_extensions()
    return bool(cells) and all(Path(cell).suffix.lower() in endings and (root / cell).is_file() for cell in cells)


def _inputs(
    form: str, names: tuple[str, ...], named: bool, frame: Any, root: Path, place: str
) -> tuple[tuple[Path, ...] | tuple[str, ...] | Features, list[int]]:
    """The inputs, and the rows that have some."""
    everything = list(range(len(frame)))
    if form == "features":
        return read_features(frame, names, named=named, place=place), everything
    cells = ["" if is_missing(cell) else str(cell) for cell in frame[names[0]].tolist()]
    if empty := [row for row, cell in enumerate(cells) if not cell.strip()]:
        raise DataError(
            f"column {names[0]!r} of {place} is empty in {len(empty)} row(s), first in row {empty[0] + 1}. Remove these "
            f"rows, or give each {'its text' if form == 'text' else 'the path of its image'}."
        )
    if form == "text":
        if len(set(cells)) < LEAST_ROWS:
            raise DataError(
                f"column {names[0]!r} of {place} has {len(set(cells))} different texts. Pass the column of the texts after "
                "--text; categories and numbers go after --features."
            )
        return tuple(cells), everything
    paths = [root / cell for cell in cells]
    kept = readable(paths, "decode", strict=False)
    return tuple(paths[row] for row in kept), kept


def _learnable(labels: Labels, *, named: bool, place: str) -> tuple[dict[str, TaskKind], list[int], dict[str, str]]:
    """Kinds and columns of the tasks that can be learned and measured, and why others cannot."""
    kinds: dict[str, TaskKind] = {}
    kept, useless = [], {}
    for number, (task, kind) in enumerate(labels.kinds.items()):
        column = labels.labels[:, number].double()
        known = column[~torch.isnan(column)]
        if why := _why_useless(kind, known):
            useless[task] = why
            continue
        # The same unit for all draws of training rows, so that their errors can be compared.
        spread = float(known.std()) if kind.name == "number" else 1.0
        kinds[task] = TaskKind("number", 1, float(known.mean()), spread, spread) if kind.name == "number" else kind
        kept.append(number)
    reasons = "; ".join(f"{task!r} ({why})" for task, why in useless.items())
    if useless and named:
        raise DataError(f"{place} has label columns that cannot be learned: {reasons}. Leave them out of --tasks.")
    if len(kinds) < 2:
        only = f"only {len(kinds)} label column(s) ({_listed(list(kinds))})" if kinds else "no label column"
        also = f"; left out: {reasons}" if reasons else ""
        raise DataError(
            f"{place} has {only} that can be learned, and methods for many tasks need two{also}. Add columns, or name other "
            "ones after --tasks."
        )
    return kinds, kept, useless


def _why_useless(kind: TaskKind, known: Tensor) -> str | None:
    counts = [count for _, count in Counter(known.tolist()).most_common()]
    if not counts:
        return "no label"
    if len(counts) == 1:
        return f"all {len(known)} labels are the same"
    if len(known) < LEAST_LABELS:
        return f"{len(known)} labels, fewer than {LEAST_LABELS}"
    if kind.name != "number" and counts[1] < LEAST_OF_CLASS:
        return f"all but {sum(counts[1:])} labels are the same"
    return None


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:12]))
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown
