"""Columns of a table as labels of tasks: kinds are found, values are checked, what is missing stays missing."""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import DataError
from .task_kinds import BINARY, TaskKind

#: More different whole numbers than this are taken for numbers, not for classes.
MOST_CLASSES = 20
_LARGEST = torch.finfo(torch.float32).max
_TRUTH = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_WHOLE = re.compile(r"[+-]?\d+")
#: A single other label among this many 0 and 1 is taken for a slip.
_MANY = 10

Cell = float | str | None


def check_columns(wanted: Sequence[str], found: Sequence[str], place: str, advice: str = "") -> None:
    """Raise DataError, with near misses, if one of the wanted columns is not there."""
    lacking = [name for name in wanted if name not in found]
    if not lacking:
        return
    near = difflib.get_close_matches(lacking[0], found, n=3) if len(lacking) == 1 else []
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"It has {', '.join(map(repr, found))}."
    what = f"column {lacking[0]!r}" if len(lacking) == 1 else f"columns {', '.join(lacking)}"
    raise DataError(f"{place} has no {what}. {hint} {advice}".rstrip())


def labels_of(
    name: str,
    values: Sequence[Any],
    kind: str | None = None,
    missing: Sequence[str] = (),
    places: Sequence[str] = (),
) -> tuple[TaskKind, Tensor, tuple[str, ...]]:
    """The labels of one column.

    Args:
        name: of the column, for errors.
        values: its cells: numbers (also with a decimal comma, where all have it), truth values, texts; ``None``, NaN and
            ``""`` are missing.
        kind: ``"binary"``, ``"classes"`` or ``"number"``; found from the values by default: 0 and 1 (or yes and no, true
            and false, -1 and 1) are binary, texts and whole numbers 0 to K-1 (at most 20 of them) are classes, others
            numbers.
        missing: further values, as texts, that stand for a missing label.
        places: where the cells are, for errors; by default their rows.

    Returns:
        The kind (mean and spread of numbers are still 0 and 1), labels ``[N]`` with NaN where one is missing, and the names
        of the classes.

    Raises:
        DataError: values that fit no kind, or not the given one; or one other label among many 0 and 1.
    """
    cells = [None if is_missing(value, missing) else _plain(value) for value in values]
    if kind != "classes":
        cells = _read_as_numbers(cells)
    known = [cell for cell in cells if cell is not None]
    if not known:
        return BINARY, torch.full((len(cells),), torch.nan), ()
    if kind is None and (slip := _slip_in(cells)) is not None:
        raise _no_binary_label(name, cells, slip, places)
    texts = sorted({cell for cell in known if isinstance(cell, str)})
    if texts and len(texts) < len(set(known)):
        if comma := next((text for text in texts if _DECIMAL_COMMA.fullmatch(text)), None):
            raise DataError(
                f"column {name!r} has decimal commas such as {comma!r} and other numbers or texts. Write all of its numbers "
                "alike."
            )
        raise DataError(
            f"column {name!r} has texts such as {texts[0]!r} and numbers. If {texts[0]!r} stands for a missing label, use "
            f"--missing-value {texts[0]}; otherwise write one kind of labels."
        )
    if any(isinstance(cell, float) and abs(cell) > _LARGEST for cell in known):
        raise DataError(
            f"column {name!r} has infinite labels, or larger ones than float32 holds. Leave these cells empty, or remove "
            "the rows."
        )
    found = kind or _kind_of(name, known, bool(texts))
    if found == "binary":
        return BINARY, _binary(name, cells, places), ()
    if found == "number":
        if texts:
            raise DataError(
                f"column {name!r} has texts such as {texts[0]!r}, and these are no numbers. Use --kind {name}=classes."
            )
        return TaskKind("number"), _tensor([math.nan if cell is None else float(cell) for cell in cells]), ()
    return _classes(name, cells)


def has_decimal_commas(values: Sequence[Any], missing: Sequence[str] = ()) -> bool:
    """Whether all cells that are not missing are numbers, and some have a decimal comma."""
    texts = [str(value).strip() for value in values if not is_missing(value, missing)]
    commas = [bool(_DECIMAL_COMMA.fullmatch(text)) for text in texts]
    return any(commas) and all(comma or _WHOLE.fullmatch(text) for text, comma in zip(texts, commas))


def without_constant_tasks(
    kinds: Mapping[str, TaskKind], labels: Tensor, train: Tensor
) -> tuple[dict[str, TaskKind], Tensor, dict[str, str]]:
    """Leave out tasks that cannot be learned, with one warning for all, and give numbers their mean and spread.

    Args:
        kinds: of the tasks.
        labels: ``[N, T]``.
        train: rows of the training split.

    Returns:
        The tasks that stay, their labels, and for each of the others why it was left out.

    Raises:
        DataError: fewer than two tasks stay.
    """
    kept: dict[str, TaskKind] = {}
    left_out: dict[str, str] = {}
    for column, (task, kind) in enumerate(kinds.items()):
        own = labels[train, column]
        own = own[~torch.isnan(own)]
        if not len(own):
            left_out[task] = "no training image has a label"
        elif own.min() == own.max():
            left_out[task] = f"all {len(own)} labels of training images are the same"
        elif kind.name == "number":
            kept[task] = TaskKind("number", mean=float(own.mean()), spread=float(own.std()))
        else:
            kept[task] = kind
    if left_out:
        reasons = "; ".join(f"{task!r} ({reason})" for task, reason in left_out.items())
        warnings.warn(f"left out, because there is nothing to learn: {reasons}.", stacklevel=2)
    if len(kept) < 2:
        raise DataError(
            f"only {len(kept)} task(s) can be learned, and relations need two. Choose other label columns, or more rows."
        )
    columns = [column for column, task in enumerate(kinds) if task in kept]
    return kept, labels[:, columns], left_out


def is_missing(value: Any, missing: Sequence[str] = ()) -> bool:
    """Whether a cell has no label: empty, NaN, or one of the texts that stand for it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    text = str(value).strip()
    # Tables turn whole numbers beside empty cells into 1.0.
    short = text[:-2] if text.endswith(".0") else text
    return text == "" or text.lower() in ("nan", "<na>") or text in missing or short in missing


def _plain(value: Any) -> float | str:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return float(value)
    text = str(value).strip()
    try:
        return float(text)
    except ValueError:
        return text


def _read_as_numbers(cells: Sequence[Cell]) -> list[Cell]:
    """Read truth values and decimal commas, where all labels of the column are such."""
    truth = [_TRUTH.get(cell.lower(), cell) if isinstance(cell, str) else cell for cell in cells]
    if all(cell in (None, 0.0, 1.0) for cell in truth) or _slip_in(truth) is not None:
        return truth
    if has_decimal_commas([f"{cell:.0f}" if isinstance(cell, float) and cell.is_integer() else cell for cell in cells]):
        return [float(cell.replace(",", ".")) if isinstance(cell, str) else cell for cell in cells]
    return list(cells)


def _slip_in(cells: Sequence[Cell]) -> Cell:
    """The only other label among many 0 and 1."""
    others = [cell for cell in cells if cell not in (None, 0.0, 1.0)]
    yes, no = cells.count(1.0), cells.count(0.0)
    return others[0] if len(others) == 1 and min(yes, no) > 0 and yes + no >= _MANY else None


def _no_binary_label(name: str, cells: Sequence[Cell], wrong: Cell, places: Sequence[str]) -> DataError:
    shown = wrong if isinstance(wrong, str) else f"{wrong:g}"
    row = cells.index(wrong)
    return DataError(
        f"column {name!r} has the label {shown}, expected 0 and 1. If it stands for a missing label, use --missing-value "
        f"{shown}; for a column of another kind, use --kind {name}=classes or --kind {name}=number; if it is a slip, "
        f"correct {places[row] if places else f'row {row}'}."
    )


def _kind_of(name: str, known: Sequence[float | str], texts: bool) -> str:
    values = set(known)
    if texts:
        return "classes"
    if values <= {0.0, 1.0} or values == {-1.0, 1.0}:
        return "binary"
    if values == {-1.0, 0.0, 1.0}:
        raise DataError(
            f"column {name!r} has the labels -1, 0 and 1: -1 may be a missing label or a class. Use --missing-value -1, or "
            f"--kind {name}=number."
        )
    whole = all(float(value).is_integer() for value in values)
    if whole and values == set(map(float, range(len(values)))) and len(values) <= MOST_CLASSES:
        return "classes"
    least, most = min(map(float, values)), max(map(float, values))
    if whole and len(values) <= MOST_CLASSES and most - least == len(values) - 1:
        warnings.warn(
            f"column {name!r} has the whole numbers {least:g} to {most:g} and becomes a regression. If they are classes, "
            f"use --kind {name}=classes.",
            stacklevel=3,
        )
    return "number"


def _binary(name: str, cells: Sequence[Cell], places: Sequence[str]) -> Tensor:
    values = {cell for cell in cells if cell is not None}
    if -1.0 in values and values <= {-1.0, 1.0}:  # as the attribute file of CelebA has them; some rows may be all -1
        return _tensor([math.nan if cell is None else float(cell == 1.0) for cell in cells])
    if wrong := sorted(values - {0.0, 1.0}, key=str):
        raise _no_binary_label(name, cells, wrong[0], places)
    return _tensor([math.nan if cell is None else float(cell) for cell in cells])


def _classes(name: str, cells: Sequence[Cell]) -> tuple[TaskKind, Tensor, tuple[str, ...]]:
    values = sorted({cell for cell in cells if cell is not None}, key=lambda cell: (isinstance(cell, str), cell))
    if len(values) < 2:
        return BINARY, _tensor([math.nan if cell is None else 0.0 for cell in cells]), ()  # constant: is left out
    if len(values) > 1000:
        raise DataError(
            f"column {name!r} has {len(values)} different labels, which are too many for classes. Use --kind "
            f"{name}=number, or leave the column out of --tasks."
        )
    number = {value: index for index, value in enumerate(values)}
    labels = _tensor([math.nan if cell is None else float(number[cell]) for cell in cells])
    return TaskKind("classes", len(values)), labels, tuple(v if isinstance(v, str) else f"{v:g}" for v in values)


def _tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
