"""What is told of each set of texts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from ..data.task_kinds import TaskKind
from ..runtime.errors import need
from .metrics import task_scores

__all__ = ["METRICS", "scores_of", "selection_score"]

#: Names in the results, to those in tables.
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "nmse": "nMSE", "pearson": "Pearson"}


def scores_of(kind: TaskKind, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """``accuracy`` and ``macro_f1`` of classes, ``nmse`` and ``pearson`` of numbers; NaN for outputs that are not finite.

    Args:
        kind: of the task.
        outputs: ``[N, K]``; for numbers ``(label - mean) / spread``.
        labels: ``[N]``.
    """
    found = task_scores(outputs, labels.unsqueeze(1), {"own": kind})["own"]
    valid = bool(torch.isfinite(outputs).all())
    if kind.name == "number":
        return {**found, "pearson": _correlation(outputs[:, 0], labels) if valid else math.nan}
    # Over the classes that occur, in labels or predictions.
    f1 = (
        need("sklearn.metrics").f1_score(labels.long(), outputs.argmax(1), average="macro", zero_division=0)
        if valid
        else math.nan
    )
    return {**found, "macro_f1": float(f1)}


def selection_score(kinds: Mapping[str, TaskKind], scores: Mapping[str, Mapping[str, float]]) -> float:
    """What a step is chosen by: the mean over the tasks of accuracy or of one minus the nMSE; -inf for NaN."""
    values = [1 - own["nmse"] if kinds[task].name == "number" else own["accuracy"] for task, own in scores.items()]
    return -math.inf if any(math.isnan(value) for value in values) else statistics.fmean(values)


def _correlation(one: Tensor, other: Tensor) -> float:
    """NaN where one of them is constant."""
    one, other = (values.double() - values.double().mean() for values in (one, other))
    length = float(one.norm() * other.norm())
    return float(one @ other) / length if length > 0 else math.nan
