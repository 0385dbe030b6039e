"""SARCOS and School: regression of many tasks, of which every training row has the label of one."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import DataError, OptionError
from .hub import load_splits
from .label_columns import check_columns
from .sources import Examples, Splits
from .task_kinds import TaskKind

JOINTS = 7
SCHOOL_INPUTS = tuple(f"x{number:02d}" for number in range(28))


def sarcos_splits(folder: str, *, seed: int, rows_per_task: int, validation_rows: int) -> Splits:
    """Seven torques of a robot arm. Each training row has one torque alone; validation and test rows have all.

    Args:
        folder: with ``train.parquet`` and ``test.parquet``.
        seed: of the draw of training and validation rows.
        rows_per_task: training rows of each torque.
        validation_rows: in all.

    Raises:
        DataError: files or columns that are missing.
        OptionError: more rows than there are.
    """
    inputs, labels, test_inputs, test_labels = _sarcos(folder)
    most = len(inputs)
    if JOINTS * rows_per_task + validation_rows > most:
        raise OptionError(
            f"{JOINTS} tasks of {rows_per_task} rows and {validation_rows} validation rows were asked for, but there are "
            f"{most} rows. Use fewer."
        )
    order = torch.randperm(most, generator=torch.Generator().manual_seed(seed))
    train, validation = order[: JOINTS * rows_per_task], order[JOINTS * rows_per_task :][:validation_rows]
    own = torch.arange(len(train)) % JOINTS
    kept = torch.where(torch.arange(JOINTS) == own.unsqueeze(1), labels[train], torch.nan)
    mean, spread = inputs[train].mean(0), inputs[train].std(0).clamp(min=1e-6)
    kinds = {}
    for joint in range(JOINTS):
        known = labels[train][own == joint, joint]
        # Of all rows: a unit of few rows would be another one for each seed.
        unit = float(labels[:, joint].std())
        kinds[f"torque {joint + 1}"] = TaskKind(
            "number", mean=float(known.mean()), spread=float(known.std()), unit=unit
        )
    return Splits(
        kinds,
        _examples((inputs[train] - mean) / spread, kept),
        _examples((inputs[validation] - mean) / spread, labels[validation]),
        _examples((test_inputs - mean) / spread, test_labels),
    )


def school_splits(folder: str, *, seed: int, validation_share: float) -> Splits:
    """Examination scores of pupils at 139 schools, a task for each school. Every row has the label of its school alone.

    Args:
        folder: with ``train.parquet`` and ``test.parquet``.
        seed: of the draw of the validation rows, within each school.
        validation_share: of the training rows.

    Raises:
        DataError: files or columns that are missing.
    """
    train, test = _school(folder)
    inputs, scores, schools = train
    names = sorted(set(schools.tolist()))
    generator = torch.Generator().manual_seed(seed)
    validation = torch.zeros(len(inputs), dtype=torch.bool)
    for school in names:
        rows = torch.nonzero(schools == school).squeeze(1)
        chosen = rows[torch.randperm(len(rows), generator=generator)]
        validation[chosen[: max(1, round(validation_share * len(rows)))]] = True
    mean, spread = inputs[~validation].mean(0), inputs[~validation].std(0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    # One mean and spread for all: scores of all schools are of the same examination.
    known = scores[~validation]
    kind = TaskKind("number", mean=float(known.mean()), spread=float(known.std()), unit=float(scores.std()))
    column = {school: index for index, school in enumerate(names)}

    def examples(inputs: Tensor, scores: Tensor, schools: Tensor) -> Examples:
        labels = torch.full((len(inputs), len(names)), torch.nan)
        labels[torch.arange(len(inputs)), torch.tensor([column[school] for school in schools.tolist()])] = (
            scores.float()
        )
        return _examples((inputs - mean) / spread, labels)

    return Splits(
        {f"school {school}": kind for school in names},
        examples(*(part[~validation] for part in train)),
        examples(*(part[validation] for part in train)),
        examples(*test),
    )


@functools.lru_cache(maxsize=2)
def fingerprint(folder: str) -> str:
    """Of the files, to tell results on other data apart.

    Raises:
        DataError: there are none.
    """
    files = sorted(path for data in ("sarcos", "school") for path in Path(folder, data).glob("*.parquet"))
    if not files:
        raise DataError(
            f"found no parquet files in {Path(folder, 'sarcos')} or {Path(folder, 'school')}. Pass the folder that has them."
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _examples(inputs: Tensor, labels: Tensor) -> Examples:
    return Examples(inputs.float(), labels.float(), tuple(range(len(inputs))))


@functools.lru_cache(maxsize=1)
def _sarcos(folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    numbers = range(1, JOINTS + 1)
    inputs = [f"{kind}_{number}" for kind in ("position", "velocity", "acceleration") for number in numbers]
    torques = [f"torque_{number}" for number in numbers]
    splits = load_splits(folder, ("train", "test"))
    train, test = (_columns(splits[name], folder, [*inputs, *torques]) for name in ("train", "test"))
    width = len(inputs)
    return train[:, :width], train[:, width:], test[:, :width], test[:, width:]


@functools.lru_cache(maxsize=1)
def _school(folder: str) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    splits = load_splits(folder, ("train", "test"))
    found = []
    for name in ("train", "test"):
        values = _columns(splits[name], folder, [*SCHOOL_INPUTS, "score", "school"])
        found.append((values[:, :-2], values[:, -2], values[:, -1].long()))
    unknown = set(found[1][2].tolist()) - set(found[0][2].tolist())
    if unknown:
        raise DataError(f"the test rows in {folder} have schools without training rows: {sorted(unknown)}.")
    return found[0], found[1]


def _columns(split: Any, folder: str, names: Sequence[str]) -> Tensor:
    check_columns(names, split.column_names, folder)
    try:
        values = torch.tensor([split[name] for name in names], dtype=torch.float64).T
    except (TypeError, ValueError) as error:
        raise DataError(f"{folder} has cells that are no numbers ({error}). Remove these rows.") from error
    if not torch.isfinite(values).all():
        raise DataError(f"{folder} has values that are not finite. Remove these rows.")
    return values
