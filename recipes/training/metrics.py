"""Metrics of tasks of any kind, over the samples whose label is known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..data.task_kinds import TaskKind, columns_of
from ..runtime.errors import need

#: Of each kind of task; all but ``nmse`` are better the higher they are.
METRICS_OF = {
    "binary": ("accuracy", "auc", "precision", "recall"),
    "classes": ("accuracy", "macro_f1"),
    "number": ("nmse", "pearson"),
}
#: How tables call them.
TITLES = {"auc": "AUC", "nmse": "nMSE", "f1": "F1", "macro_f1": "macro F1", "pearson": "Pearson"}


def task_scores(outputs: Tensor, labels: Tensor, kinds: Mapping[str, TaskKind]) -> dict[str, dict[str, float]]:
    """Measure each task; NaN where its labels (or what is left of them) allow no value.

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
        own, names = outputs[known][:, columns], METRICS_OF[kind.name]
        found[task] = _MEASURES[kind.name](kind, own, truth[known]) if known.any() else dict.fromkeys(names, math.nan)
    return found


def macro(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the tasks that have it.

    A task whose labels allow no value is left out. With outputs that are not finite, no task has any: the mean is NaN.
    """
    names = dict.fromkeys(name for own in scores.values() for name in own)
    return {name: mean_of_known([own[name] for own in scores.values() if name in own]) for name in names}


def selection_score(scores: Mapping[str, Mapping[str, float]], kinds: Mapping[str, TaskKind]) -> float:
    """What weights are chosen by: the mean over the tasks of AUC, accuracy or one minus the nMSE; -inf if there is none."""
    values = [
        1 - scores[task]["nmse"] if kind.name == "number" else scores[task][kind.score]
        for task, kind in kinds.items()
        if task in scores
    ]
    mean = mean_of_known(values)
    return -math.inf if math.isnan(mean) else mean


def mean_of_known(values: Sequence[float]) -> float:
    """NaN if all of them are."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


def area_under_curve(logits: Tensor, labels: Tensor) -> float:
    """The area under the ROC curve of one binary task ``[N]``: a ratio of whole numbers, rounded once."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:  # there is nothing to rank
        return math.nan
    ranks = torch.from_numpy(need("scipy.stats").rankdata(logits.numpy()))
    above = float(ranks[labels > 0.5].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def f1_scores(logits: Tensor, labels: Tensor, threshold: float) -> list[float]:
    """F1 of each binary task; 0 where a task with true labels is never predicted, NaN where it has none.

    Args:
        logits, labels: ``[N, T]``; NaN is a missing label.
        threshold: of the logits.
    """
    known = ~torch.isnan(labels)
    said, true = (logits > threshold) & known, (labels > 0.5) & known
    hits = (said & true).sum(0).double()
    found = 2 * hits / (said.sum(0) + true.sum(0)).clamp(min=1)
    values: list[float] = torch.where(true.any(0), found, torch.nan).tolist()
    return values


def best_threshold(logits: Tensor, labels: Tensor) -> float:
    """The one threshold for all tasks with the highest macro F1, among probabilities from 0.02 to 0.98.

    One for all: a threshold of its own for a task with four validation samples would be noise.
    """
    candidates: list[float] = torch.linspace(0.02, 0.98, 49).logit().tolist()
    return max(candidates, key=lambda threshold: mean_of_known(f1_scores(logits, labels, threshold)))


def with_f1(
    scores: Mapping[str, Mapping[str, float]],
    outputs: Mapping[str, Tensor],
    validation: Mapping[str, Tensor],
    rare: Sequence[str],
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Scores with ``f1`` for each task, and macro figures: ``f1``, ``f1_rare``, ``auc_rare``, and the ``threshold``.

    Args:
        scores: of the tasks on the test split.
        outputs, validation: ``"outputs"`` and ``"labels"`` of the test and the validation split.
        rare: tasks whose mean is also told apart.
    """
    threshold = best_threshold(validation["outputs"], validation["labels"])
    values = dict(zip(scores, f1_scores(outputs["outputs"], outputs["labels"], threshold)))
    found = {task: {**own, "f1": values[task]} for task, own in scores.items()}
    return found, {
        "f1": mean_of_known(list(values.values())),
        "f1_rare": mean_of_known([values[task] for task in rare]),
        "auc_rare": mean_of_known([scores[task]["auc"] for task in rare]),
        "threshold": float(torch.tensor(threshold, dtype=torch.float64).sigmoid()),
    }


def _binary(kind: TaskKind, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    del kind
    logits = outputs[:, 0]
    said, true = logits > 0, labels > 0.5
    hits = float((said & true).sum())
    return {
        "accuracy": float((said == true).double().mean()),
        "auc": area_under_curve(logits, labels),
        # A task that never says yes has no precision; 0 is the convention.
        "precision": hits / max(float(said.sum()), 1.0),
        "recall": hits / float(true.sum()) if true.any() else math.nan,
    }


def _classes(kind: TaskKind, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    del kind
    said, true = outputs.argmax(1), labels.long()
    # Over the classes that occur, in labels or predictions.
    f1 = need("sklearn.metrics").f1_score(true, said, average="macro", zero_division=0)
    return {"accuracy": float((said == true).double().mean()), "macro_f1": float(f1)}


def _number(kind: TaskKind, outputs: Tensor, labels: Tensor) -> dict[str, float]:
    values, labels = outputs[:, 0].double(), labels.double()
    errors = (values * kind.spread + kind.mean - labels) / kind.error_unit
    one, other = values - values.mean(), labels - labels.mean()
    length = float(one.norm() * other.norm())
    return {
        "nmse": float(errors.square().mean()),
        "pearson": float(one @ other) / length if length > 0 else math.nan,  # one of them is constant
    }


_MEASURES = {"binary": _binary, "classes": _classes, "number": _number}
