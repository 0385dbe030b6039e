"""One training whose relations are gathered, from plain values to a small result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.own_rows.rows import Columns, read_rows
from ...data.sources import Source
from ...methods.methods import METHODS, Methods
from ...models.architectures.registry import build
from ...runs.command_line import DEFAULT_METHOD
from ...training.metrics import selection_score
from ...training.optimizers import OPTIMIZERS
from ...training.train import Data, train
from ..cell_training import cell_options
from ..comparison.cells import labels_of
from ..comparison.data_sets.blueprints import with_flat_outputs
from ..comparison.data_sets.options import Place, data_set_at
from ..study import Cell
from .chance import above_chance

#: Hard sharing with the regularizer as it is if nothing is passed: relations are learned, and nothing is tuned.
ONE_METHOD = Methods()
METHOD = ONE_METHOD.add(METHODS[DEFAULT_METHOD])
#: Significant digits.
_DIGITS = 5


@dataclass(frozen=True)
class Related:
    """What of a training is kept."""

    content: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.content)


def train_related(cell: Cell, place: Place, folder: Path) -> Related:
    """Train one cell on the data of a place.

    Returns:
        ``"tasks"``; ``"views"``, matrices ``[T, T]`` by name; ``"common_labels"`` ``[T, T]``, of the training samples;
        ``"chance"``, of test scores (:func:`.chance.above_chance`); ``"validation"`` and ``"macro"``, the mean score;
        ``"kept_after"``, the epoch that the views are from.
    """
    problem = data_set_at(place).build(cell.setting.values, place.where, cell.seed)
    outcome = train(
        lambda: with_flat_outputs(build(cell.method.architecture, problem.blueprint)),
        Data(problem.kinds, problem.train, problem.validation, problem.test, problem.collate),
        cell.method,
        cell.value,
        cell_options(cell),
        folder=folder,
        resume="auto",
        make_optimizer=OPTIMIZERS[cell.setting.values["decayed"]],
    )
    assert outcome.views is not None  # the values ask for them
    score = selection_score(outcome.scores, problem.kinds)
    losses = outcome.curves["validation_loss"]
    least = min((loss for loss in losses if math.isfinite(loss)), default=losses[0])
    return Related(
        {
            "tasks": list(problem.kinds),
            "views": {name: _rounded(matrix) for name, matrix in outcome.views.matrices.items()},
            "common_labels": common_labels(problem.train, problem.collate),
            "chance": above_chance(outcome.outputs["outputs"], outcome.outputs["labels"], problem.kinds),
            "validation": outcome.validation,
            "macro": {"score": score},
            "kept_after": int(outcome.curves["epoch"][losses.index(least)]),
        }
    )


def found_in_table(place: Columns) -> str:
    """What was found in a table of one's own, for people."""
    return f"{read_rows(place).about}\n"


def common_labels(source: Source, collate: Any = None) -> list[list[int]]:
    """``[T, T]``: how many samples have the labels of both tasks."""
    known = (~torch.isnan(labels_of(source, collate))).double()
    counts: list[list[int]] = (known.T @ known).long().tolist()
    return counts


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[float(f"{value:.{_DIGITS}g}") for value in row] for row in matrix.tolist()]
