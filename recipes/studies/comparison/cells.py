"""One training of any method on any data set: from plain values to a small result."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.sources import Collate, Source
from ...data.task_kinds import TaskKind
from ...methods.methods import METHODS, RELATIONS, Method, Methods
from ...models.architectures.registry import build
from ...training.batches import Feed, MicroBatch
from ...training.metrics import macro, selection_score, task_scores
from ...training.optimizers import OPTIMIZERS
from ...training.outcome import Outcome
from ...training.train import Data, train
from ..cell_training import cell_options
from ..study import Cell
from .data_sets.blueprints import with_flat_outputs
from .data_sets.options import Place, data_set_at
from .data_sets.own_data import SCORE
from .problem import DataSet, Problem

#: Relations of more tasks than this are kept of one method and seed alone.
MOST_RELATED = 40
_PICTURED = ("srdml", "srdml_default")
#: Significant digits.
_OF_SCORES, _OF_CURVES, _OF_RELATIONS = 6, 4, 3


@dataclass(frozen=True)
class _Constant(Method):
    """Nothing is tuned, and nothing trained."""

    @property
    def parameter(self) -> str:
        return ""


#: The best guess for each task without a look at the inputs.
CONSTANT = _Constant("constant", "Constant")
COMPARED_METHODS = Methods(torchjd=True, families=(RELATIONS,))
for _method in (CONSTANT, *METHODS.values()):
    COMPARED_METHODS.add(_method)


@dataclass(frozen=True)
class Compared:
    """What of a training is kept."""

    content: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.content)


def train_compared(cell: Cell, place: Place, folder: Path) -> Compared:
    """Train one cell on the data of a place.

    Returns:
        ``"validation"``, by which it is tuned; and of a reported cell ``"macro"`` and ``"scores"`` with the metrics of the
        data set, ``"curves"``, ``"relations"``, and ``"costs"``: ``"parameters"``, ``"seconds_per_step"`` and
        ``"peak_memory"`` (bytes).
    """
    values, method = cell.setting.values, cell.method
    data_set = data_set_at(place)
    problem = data_set.build(values, place.where, cell.seed)
    if method.key == CONSTANT.key:
        return _constant(cell, data_set, problem)
    outcome = train(
        lambda: with_flat_outputs(build(method.architecture, problem.blueprint)),
        Data(
            problem.kinds,
            problem.train,
            problem.validation,
            problem.test if cell.reported else None,
            problem.collate,
        ),
        method,
        cell.value,
        cell_options(cell, measure_costs=cell.reported),
        folder=folder,
        resume="auto",
        make_optimizer=OPTIMIZERS[values["decayed"]],
    )
    return _kept(cell, data_set, problem, outcome)


def constant_outputs(kinds: Mapping[str, TaskKind], labels: Tensor) -> Tensor:
    """``[K]``, the outputs of all tasks side by side that have the least loss on labels ``[N, T]`` without any input.

    Logits of how often a label is true, of how often a class occurs, each with one more; or the mean of a number. A task
    without labels has 0.
    """
    found = []
    for kind, own in zip(kinds.values(), labels.double().unbind(1)):
        known = own[~torch.isnan(own)]
        if kind.name == "number":
            mean = (known.mean() - kind.mean) / kind.spread if len(known) else torch.zeros((), dtype=torch.float64)
            found.append(mean.reshape(1))
        elif kind.name == "binary":
            true = known.sum()
            found.append(torch.log((true + 1) / (len(known) - true + 1)).reshape(1))
        else:
            counts = torch.bincount(known.long(), minlength=kind.classes).double() + 1
            found.append(torch.log(counts / counts.sum()))
    return torch.cat(found)


def labels_of(source: Source, collate: Collate | None = None) -> Tensor:
    """``[N, T]``: all labels of a split."""
    known = getattr(source, "labels", None)
    if isinstance(known, Tensor):
        return known
    # Nothing but the samples has them.
    batches = [MicroBatch(0, [index]) for index in range(len(source))]
    return torch.cat([labels for _, labels in Feed(source, 0, collate=collate)(batches)])


def _constant(cell: Cell, data_set: DataSet, problem: Problem) -> Compared:
    outputs = constant_outputs(problem.kinds, labels_of(problem.train, problem.collate))

    def scores(source: Source) -> dict[str, dict[str, float]]:
        labels = labels_of(source, problem.collate)
        return task_scores(outputs.expand(len(labels), -1), labels, problem.kinds)

    validation = selection_score(scores(problem.validation), problem.kinds)
    test = scores(problem.test) if cell.reported else {}
    return _content(data_set, problem, validation, test, {}, None, {})


def _kept(cell: Cell, data_set: DataSet, problem: Problem, outcome: Outcome) -> Compared:
    if not cell.reported:
        return _content(data_set, problem, outcome.validation, {}, {}, None, {})
    relations = outcome.relations
    learned = relations is not None and cell.method.rule != "fixed"
    if relations is not None and len(relations) > MOST_RELATED:
        learned = learned and cell.method.key in _PICTURED and cell.seed == 0
    parameters = sum(parameter.numel() for parameter in outcome.model.parameters())
    costs = {"parameters": parameters, **outcome.costs}
    kept = relations if learned else None
    return _content(data_set, problem, outcome.validation, outcome.scores, outcome.curves, kept, costs)


def _content(
    data_set: DataSet,
    problem: Problem,
    validation: float,
    scores: Mapping[str, Mapping[str, float]],
    curves: Mapping[str, list[float]],
    relations: list[list[float]] | None,
    costs: Mapping[str, float],
) -> Compared:
    names = data_set.metrics
    own = {task: {name: all_of[name] for name in names if name in all_of} for task, all_of in scores.items()}
    figures = macro(own)
    if scores and SCORE in names:
        score = selection_score(scores, problem.kinds)
        figures = {SCORE: score if math.isfinite(score) else math.nan, **figures}
    return Compared(
        {
            "validation": validation,
            "macro": figures,
            "scores": {task: _rounded(all_of, _OF_SCORES) for task, all_of in own.items()},
            "curves": {name: [_round(value, _OF_CURVES) for value in curve] for name, curve in curves.items()},
            "relations": None
            if relations is None
            else [[_round(one, _OF_RELATIONS) for one in row] for row in relations],
            "costs": _rounded(costs, _OF_CURVES),
        }
    )


def _rounded(values: Mapping[str, float], digits: int) -> dict[str, float]:
    return {name: value if isinstance(value, int) else _round(value, digits) for name, value in values.items()}


def _round(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value
