"""Sets of labelled texts, each with one task of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...runtime.errors import DataError
from ..hub import load_tables
from ..label_columns import check_columns
from ..task_kinds import TaskKind

_PAIRS = (
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "passage"),
)
_SINGLE = ("sentence", "text", "content", "review", "document", "tweet")
_LABELS = ("label", "labels", "score", "similarity_score", "target", "stars", "answer")
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class Rows:
    """Texts of one split, and their labels.

    Attributes:
        texts: N of them.
        pairs: the second text of each, or none.
        labels: ``[N]``, numbers of classes, or numbers.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextSet:
    """One set of texts.

    Attributes:
        name: of its task.
        source: folder, file, or id.
        columns: of the texts and, last, of the labels.
        kind: ``classes`` or ``number``, with mean and spread of the training labels.
        classes: names of the classes.
        splits: those with labels.
        unlabelled: splits that have none.
        left_out: rows without a text or a label, of all splits.
    """

    name: str
    source: str
    columns: tuple[str, ...]
    kind: TaskKind
    classes: tuple[str, ...]
    splits: dict[str, Rows]
    unlabelled: tuple[str, ...]
    left_out: int

    @property
    def reported(self) -> str:
        """The split whose scores are told."""
        return "test" if "test" in self.splits else "validation"


def read_set(name: str, source: str, columns: Sequence[str] = (), *, skip: bool = False) -> TextSet:
    """Read a set.

    Args:
        name: of its task.
        source: as in :func:`load_tables`.
        columns: one or two of texts, and that of the labels; by default those with common names.
        skip: leave out rows without a text or a label; otherwise they are an error.

    Raises:
        DataError: data that cannot be used as they are.
    """
    tables = load_tables(source)
    texts, label = _columns(name, source, columns, tables["train"].column_names)
    for split, table in tables.items():
        check_columns(texts, table.column_names, f"the {split} split of {source}")
    cells = {split: _label_cells(table, label) for split, table in tables.items()}
    # Published test splits often have a placeholder in place of labels.
    unlabelled = tuple(split for split, own in cells.items() if all(cell is None or cell == -1 for cell in own))
    if "train" in unlabelled:
        raise DataError(f"the training split of {source} has no labels in the column {label!r}. Choose other data.")
    kind, names, number_of = _kind(name, source, tables["train"].features[label], cells["train"])
    if kind.name == "classes":  # -1 is no class, but what stands for a missing one
        cells = {split: [None if cell == -1 else cell for cell in own] for split, own in cells.items()}
    splits, left_out = {}, 0
    for split, table in tables.items():
        if split not in unlabelled:
            place = f"the {split} split of {source}"
            splits[split] = _rows(place, table, texts, cells[split], number_of, skip)
            left_out += len(table) - len(splits[split])
    if set(splits) == {"train"}:
        raise DataError(
            f"{source} has no labelled validation or test split (found {', '.join(tables)}), so nothing could be measured. "
            "Add a file with validation texts and labels."
        )
    labels = splits["train"].labels
    if labels.min() == labels.max():
        raise DataError(
            f"all {len(labels)} training labels of {source} are the same, so there is nothing to learn. Choose another "
            f"label column: --columns {name}={','.join((*texts, 'LABEL'))}."
        )
    if kind.name == "number":
        kind = TaskKind("number", mean=float(labels.double().mean()), spread=float(labels.double().std()))
    return TextSet(name, source, (*texts, label), kind, names, splits, unlabelled, left_out)


def _columns(name: str, source: str, given: Sequence[str], found: Sequence[str]) -> tuple[tuple[str, ...], str]:
    place = f"the train split of {source}"
    if given:
        check_columns(given, found, place)
        return tuple(given[:-1]), given[-1]
    texts = next((own for own in (*_PAIRS, *((one,) for one in _SINGLE)) if set(own) <= set(found)), None)
    label = next((own for own in _LABELS if own in found), None)
    if texts is None or label is None:
        what = "texts" if texts is None else "labels"
        raise DataError(
            f"{place} has the columns {', '.join(found)}, and none with a common name of {what}. Use --columns "
            f"{name}=TEXT,LABEL or --columns {name}=TEXT,TEXT,LABEL."
        )
    return texts, label


def _label_cells(table: Any, label: str) -> list[Any]:
    if label not in table.column_names:
        return [None] * len(table)
    cells = list(table[label])
    return [None if isinstance(cell, float) and math.isnan(cell) else cell for cell in cells]


def _kind(name: str, source: str, feature: Any, cells: Sequence[Any]) -> tuple[TaskKind, tuple[str, ...], Any]:
    """The kind of the task, names of classes, and what maps a cell to its number, or to ``None``."""
    known = [cell for cell in cells if cell is not None]
    if wrong := [cell for cell in known if not isinstance(cell, (int, float, str))]:
        raise DataError(
            f"the labels of {source} are of the kind {type(wrong[0]).__name__}, expected a number or a text for each row. "
            f"Use --columns {name}=TEXT,LABEL with another column."
        )
    names = tuple(map(str, getattr(feature, "names", None) or ()))
    if names:
        values: list[Any] = list(range(len(names)))
    elif all(isinstance(cell, float) for cell in known):
        return TaskKind("number"), (), lambda cell: float(cell) if isinstance(cell, (int, float)) else None
    elif len({isinstance(cell, str) for cell in known}) > 1:
        raise DataError(f"the labels of {source} are texts and numbers. Write one kind of labels.")
    else:
        values = sorted({cell for cell in known if cell != -1})
        names = tuple(map(str, values))
    if len(values) < 2:
        raise DataError(
            f"the training labels of {source} are all {values[0]!r}, so there is nothing to learn. Choose another label "
            f"column: --columns {name}=TEXT,LABEL."
        )
    if len(values) > _MOST_CLASSES:
        raise DataError(
            f"the labels of {source} have {len(values)} different values, which are too many for classes. Save them as "
            "floating-point numbers for a regression, or use --columns with another column."
        )
    numbers = {value: number for number, value in enumerate(values)}
    return TaskKind("classes", len(values)), names, numbers.get


def _rows(place: str, table: Any, columns: Sequence[str], cells: Sequence[Any], number_of: Any, skip: bool) -> Rows:
    texts = [list(table[column]) for column in columns]
    kept, labels = [], []
    for row, cell in enumerate(cells):
        own = [column[row] for column in texts]
        if wrong := [text for text in own if text is not None and not isinstance(text, str)]:
            raise DataError(
                f"row {row} of {place} has {wrong[0]!r} where a text is expected. Use --columns with columns of texts."
            )
        lacks = "no label" if cell is None else "no text" if any(not text or not text.strip() for text in own) else ""
        if lacks:
            if skip:
                continue
            raise DataError(f"row {row} of {place} has {lacks}. Use --skip-incomplete to leave such rows out.")
        label = number_of(cell)
        if label is None or not math.isfinite(label):
            raise DataError(
                f"row {row} of {place} has the label {cell!r}, which is none of the training split's. Correct it, or "
                "remove the row."
            )
        kept.append(row)
        labels.append(float(label))
    if not kept:
        raise DataError(f"{place} has no row with a text and a label. Choose other data.")
    chosen = [tuple(column[row] for row in kept) for column in texts]
    return Rows(chosen[0], chosen[1] if len(chosen) > 1 else None, torch.tensor(labels))
