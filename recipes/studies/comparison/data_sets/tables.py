"""Data sets of rows of numbers: SARCOS, School, groups of textbooks, Tox21, and the paper's synthetic tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....data.groups import SOURCES, read_known, split_groups
from ....data.hub import fingerprint_of
from ....data.molecules import MoleculeTable, molecule_splits, read_molecules
from ....data.sources import Examples, Splits
from ....data.tabular import sarcos_splits, school_splits
from ....data.task_kinds import TaskKind
from ....runtime.errors import OptionError
from ...linear_tasks.problem import FEATURES, TASKS, Regression
from ...linear_tasks.problem import Problem as LinearProblem
from ..problem import (
    BINARY_COMPARED,
    BINARY_METRICS,
    COMMON_VALUES,
    NUMBER_COMPARED,
    NUMBER_METRICS,
    DataSet,
    Problem,
)
from .blueprints import blueprint_of, perceptron
from .places import file_digest, folder_of, no_fingerprint
from .spaces import SHARES_ON_HEADS, SHARES_THROUGH_HEADS


def _sarcos(values: Mapping[str, Any], place: Any, seed: int) -> Problem:
    rows = {name: values[name] for name in ("rows_per_task", "validation_rows")}
    return _on_perceptron(sarcos_splits(folder_of(place, "sarcos"), seed=seed, **rows), values)


def _school(values: Mapping[str, Any], place: Any, seed: int) -> Problem:
    share = values["validation_share"]
    return _on_perceptron(school_splits(folder_of(place, "school"), seed=seed, validation_share=share), values)


def _groups(values: Mapping[str, Any], place: Any, seed: int) -> Problem:
    table = read_known(_source(place), None)
    drawn = split_groups(table, rows=values["rows"], validation_rows=values["validation_rows"], seed=seed)
    # Targets are in standard units of the training rows already.
    kind = TaskKind("number", unit=drawn.variance**0.5)
    count = len(drawn.names)

    def rows_of(inputs: Tensor, targets: Tensor) -> Examples:
        """From ``[T, n, D]`` and ``[T, n]``."""
        groups = torch.arange(count).repeat_interleave(targets.shape[1])
        return _of_one_task(inputs.flatten(0, 1), targets.flatten(), groups, count)

    splits = Splits(
        {f"group {name}": kind for name in drawn.names},
        rows_of(drawn.train.inputs, drawn.train.targets),
        rows_of(drawn.validation.inputs, drawn.validation.targets),
        _of_one_task(drawn.test_inputs, drawn.test_targets, drawn.test_groups, count),
    )
    return _on_perceptron(splits, values)


def _tox21(values: Mapping[str, Any], place: Any, seed: int) -> Problem:
    molecules = read_molecules(MoleculeTable(_tox21_file(place)), values["bits"])
    names = ("labels", "labelled", "validation_share", "test_share")
    return _on_perceptron(molecule_splits(molecules, seed=seed, **{name: values[name] for name in names}), values)


def _synthetic(values: Mapping[str, Any], place: Any, seed: int) -> Problem:
    del place
    names = ("train", "validation", "test", "noise", "shared_inputs", "weights")
    drawn = LinearProblem(**{name: values[name] for name in names}).draw(seed)
    # As they are, large beside new weights, as in the paper. The unit of errors is the deviation of the targets.
    kinds = {task: TaskKind("number", unit=float(own.norm())) for task, own in zip(TASKS, drawn.weights)}

    def rows_of(part: Regression) -> Examples:
        tasks = torch.arange(len(TASKS)).repeat_interleave(part.targets.shape[1])
        return _of_one_task(part.inputs.flatten(0, 1).float(), part.targets.flatten().float(), tasks, len(TASKS))

    splits = Splits(kinds, rows_of(drawn.train), rows_of(drawn.validation), rows_of(drawn.test))
    blueprint = blueprint_of(
        kinds,
        lambda: nn.Linear(FEATURES, FEATURES, bias=False),
        FEATURES,
        0,
        values["activation"],
        example=splits.train.inputs[:1],
    )
    return Problem(kinds, splits.train, splits.validation, splits.test, blueprint)


def _on_perceptron(splits: Splits, values: Mapping[str, Any]) -> Problem:
    widths = (splits.train.inputs.shape[1], *values["widths"])
    activation = values["activation"]
    backbone = perceptron(widths, activation)
    example = splits.train.inputs[:1]
    blueprint = blueprint_of(splits.kinds, backbone, widths[-1], values["head_width"], activation, example=example)
    return Problem(splits.kinds, splits.train, splits.validation, splits.test, blueprint)


def _of_one_task(inputs: Tensor, targets: Tensor, tasks: Tensor, count: int) -> Examples:
    """Rows ``[N, D]`` of which each has the label of one task alone."""
    labels = torch.full((len(inputs), count), torch.nan)
    labels[torch.arange(len(inputs)), tasks] = targets
    return Examples(inputs, labels, tuple(range(len(inputs))))


def _source(place: Any) -> str:
    """A name of ``SOURCES`` that is no file.

    Raises:
        OptionError: there is none of this name.
    """
    known = [name for name, source in SOURCES.items() if source.item is not None]
    if str(place).lower() not in known:
        raise OptionError(f"found no groups of the name {str(place)!r}. Use --folder with one of {', '.join(known)}.")
    return str(place).lower()


def _groups_fingerprint(place: Any) -> str:
    table = read_known(_source(place), None)
    return fingerprint_of(table.values, table.targets, table.groups)


def _table_fingerprint(name: str, place: Any) -> str:
    folder = Path(folder_of(place, name))
    return file_digest((folder / f"{split}.parquet" for split in ("train", "test")), f"{folder}/train.parquet")


def _sarcos_fingerprint(place: Any) -> str:
    return _table_fingerprint("sarcos", place)


def _school_fingerprint(place: Any) -> str:
    return _table_fingerprint("school", place)


def _tox21_file(place: Any) -> str:
    return folder_of(place, "tox21.parquet", "molecules/tox21.parquet")


def _tox21_fingerprint(place: Any) -> str:
    file = Path(_tox21_file(place))
    return file_digest([file], str(file if file.suffix else file / "tox21.parquet"))


_NUMBERS: dict[str, Any] = {"metrics": NUMBER_METRICS, "compared": NUMBER_COMPARED}
SARCOS = DataSet(
    "sarcos",
    "SARCOS, {rows_per_task} rows for each of 7 torques",
    {
        **COMMON_VALUES,
        "data": "sarcos",
        "rows_per_task": 30,
        "validation_rows": 500,
        "widths": [64, 64],
        "head_width": 16,
        "epochs": 40,
        "evaluations": 10,
        "batch_size": 35,
        "learning_rate": 5e-3,
    },
    tasks=7,
    build=_sarcos,
    fingerprint=_sarcos_fingerprint,
    spaces={"weight decay": (0.0, 0.5, 5.0), "share": SHARES_THROUGH_HEADS},
    needs_data="folder that has sarcos/train.parquet and sarcos/test.parquet",
    **_NUMBERS,
)
SCHOOL = DataSet(
    "school",
    "School, 139 tasks",
    {
        **COMMON_VALUES,
        "data": "school",
        "validation_share": 0.2,
        "widths": [32],
        "head_width": 0,
        "decayed": "heads",
        "epochs": 5,
        "evaluations": 5,
        "batch_size": 600,
        "learning_rate": 5e-3,
    },
    tasks=139,
    build=_school,
    fingerprint=_school_fingerprint,
    spaces={"weight decay": (0.0, 3.0, 30.0), "share": SHARES_ON_HEADS},
    needs_data="folder that has school/train.parquet and school/test.parquet",
    **_NUMBERS,
)
GROUPS = DataSet(
    "groups",
    "Groups, {rows} rows of each",
    {
        **COMMON_VALUES,
        "data": "groups",
        "rows": 10,
        "validation_rows": 3,
        "widths": [32],
        "head_width": 0,
        "decayed": "heads",
        "decay": "constant",
        "epochs": 20,
        "evaluations": 5,
        "batch_size": 400,
        "learning_rate": 5e-3,
    },
    tasks=160,
    build=_groups,
    fingerprint=_groups_fingerprint,
    spaces={"weight decay": (0.0, 10.0, 100.0), "share": SHARES_ON_HEADS},
    place="hsb82",
    **_NUMBERS,
)
TOX21 = DataSet(
    "tox21",
    "Tox21, {labels} labels per assay",
    {
        **COMMON_VALUES,
        "data": "tox21",
        "bits": 1024,
        "labels": 150,
        "labelled": "one",
        "validation_share": 0.15,
        "test_share": 0.2,
        "widths": [128, 64],
        "head_width": 0,
        "decayed": "heads",
        "epochs": 15,
        "evaluations": 15,
        "batch_size": 120,
        "learning_rate": 2e-3,
    },
    tasks=12,
    build=_tox21,
    fingerprint=_tox21_fingerprint,
    metrics=BINARY_METRICS,
    compared=BINARY_COMPARED,
    spaces={"weight decay": (0.0, 3.0, 30.0), "share": SHARES_ON_HEADS},
    needs_data="folder that has tox21.parquet",
)
SYNTHETIC = DataSet(
    "synthetic",
    "Synthetic, 12 linear tasks, weights a_t * {weights}",
    {
        **COMMON_VALUES,
        "data": "synthetic",
        "train": 10,
        "validation": 40,
        "test": 200,
        "noise": 0.01,
        "shared_inputs": False,
        "weights": "normal",
        "epochs": 300,
        "evaluations": 20,
        "batch_size": 120,
        "learning_rate": 0.03,
        "decay": "constant",
    },
    tasks=len(TASKS),
    build=_synthetic,
    fingerprint=no_fingerprint,
    spaces={"share": SHARES_ON_HEADS},
    **_NUMBERS,
)
