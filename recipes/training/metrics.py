"""Metrics of tasks of any kind, over the samples whose label is known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from ..data.task_kinds import TaskKind, columns_of
from ..runtime.errors import need

__all__ = ["METRICS_OF", "macro", "score_of", "task_scores"]

#: Of each kind of task; all but ``nmse`` are better the higher they are.
METRICS_OF = {
    "binary": ("accuracy", "auc", "precision", "recall"),
    "classes": ("accuracy",),
    "number": ("nmse",),
}


def task_scores(outputs: Tensor, labels: Tensor, kinds: Mapping[str, TaskKind]) -> dict[str, dict[str, float]]:
    """Each task's metrics; NaN where its labels (or what is left of them) allow none.

    Args:
        outputs: ``[N, K]``, those of all tasks side by side.
        labels: ``[N, T]``, NaN where one is missing.
        kinds: of the tasks.

    Returns:
        ``{task: {metric: value}}``. ``accuracy`` of a binary task is at a probability of one half. ``nmse`` is the mean
        squared error over the square of the kind's unit, which is a standard deviation of training labels.
    """
    if not torch.isfinite(outputs).all():  # a mean over fewer tasks would flatter a model that diverged
        return {task: dict.fromkeys(METRICS_OF[kind.name], math.nan) for task, kind in kinds.items()}
    found = {}
    for (task, kind), columns, truth in zip(kinds.items(), columns_of(kinds), labels.unbind(1)):
        known = ~torch.isnan(truth)
        found[task] = _scores(kind, outputs[known][:, columns], truth[known])
    return found


def macro(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the tasks that have it.

    A task whose labels allow no value is left out. With outputs that are not finite, no task has any: the mean is NaN.
    """
    names = dict.fromkeys(name for own in scores.values() for name in own)
    means = {}
    for name in names:
        values = [own[name] for own in scores.values() if name in own and not math.isnan(own[name])]
        means[name] = statistics.fmean(values) if values else math.nan
    return means


def score_of(outputs: Tensor, labels: Tensor, kinds: Mapping[str, TaskKind]) -> float:
    """What a model is chosen by: the mean over the tasks of AUC, accuracy or one minus the nMSE; -inf for NaN outputs."""
    if not torch.isfinite(outputs).all():
        return -math.inf
    scores = task_scores(outputs, labels, kinds)
    values = [
        1 - scores[task]["nmse"] if kind.name == "number" else scores[task][kind.score] for task, kind in kinds.items()
    ]
    values = [value for value in values if not math.isnan(value)]
    return statistics.fmean(values) if values else -math.inf


def _scores(kind: TaskKind, outputs: Tensor, truth: Tensor) -> dict[str, float]:
    names = METRICS_OF[kind.name]
    if not len(truth):
        return dict.fromkeys(names, math.nan)
    if kind.name == "classes":
        return {"accuracy": float((outputs.argmax(1) == truth.long()).double().mean())}
    values, labels = outputs[:, 0].double(), truth.double()
    if kind.name == "number":
        errors = (values * kind.spread + kind.mean - labels) / kind.error_unit
        nmse = float(errors.square().mean())
        return {"nmse": nmse}
    return _binary(values, labels)


def _binary(logits: Tensor, labels: Tensor) -> dict[str, float]:
    said, true = logits > 0, labels > 0.5
    hits = float((said & true).sum())
    found = {
        "accuracy": float((said == true).double().mean()),
        "auc": math.nan,
        # A task that never says yes has no precision; 0 is the convention.
        "precision": hits / max(float(said.sum()), 1.0),
        "recall": hits / float(true.sum()) if true.any() else math.nan,
    }
    if true.any() and not true.all():  # otherwise there is nothing to rank
        found["auc"] = float(need("sklearn.metrics").roc_auc_score(true.numpy(), logits.numpy()))
    return found
