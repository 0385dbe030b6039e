"""Metrics of binary tasks, and their summary over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..runtime.errors import need

__all__ = [
    "METRICS",
    "Summary",
    "mean_and_deviation",
    "paired_difference",
    "summarise",
    "task_auc",
    "task_metrics",
]

METRICS = ("accuracy", "auc", "precision", "recall")

Summary = dict[str, dict[str, float | None]]


def task_metrics(logits: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Each metric of each task, from logits and labels ``[N, T]``; the threshold is a probability of one half."""
    metrics = need("sklearn.metrics")
    values: dict[str, list[float]] = {name: [] for name in METRICS}
    for scores, truth in zip(logits.T.numpy(), labels.T.numpy()):
        predicted = scores > 0
        values["accuracy"].append(float(metrics.accuracy_score(truth, predicted)))
        values["auc"].append(float(metrics.roc_auc_score(truth, scores)))
        # A task that never says yes has no precision; 0 is the convention.
        values["precision"].append(float(metrics.precision_score(truth, predicted, zero_division=0)))
        values["recall"].append(float(metrics.recall_score(truth, predicted)))
    return values


def task_auc(logits: Tensor, labels: Tensor) -> Tensor:
    """``[T]``, area under the ROC curve of each task; NaN for logits that are not finite.

    The same as scikit-learn's, from the ranks of all tasks at once: quick enough for every epoch.
    """
    if not torch.isfinite(logits).all():
        return torch.full(labels.shape[1:], math.nan, dtype=torch.float64)
    ranks = torch.from_numpy(need("scipy.stats").rankdata(logits.numpy(), axis=0))
    positive = labels.double().sum(0)
    above = (ranks * labels).sum(0) - positive * (positive + 1) / 2
    return above / (positive * (len(labels) - positive))


def summarise(per_seed: Sequence[Mapping[str, float]]) -> Summary:
    """Mean and sample standard deviation of each metric; a single seed has no deviation."""
    summary: Summary = {}
    for name in METRICS:
        values = [metrics[name] for metrics in per_seed]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.fmean(values), "std": deviation}
    return summary


def paired_difference(
    ours: Mapping[int, Mapping[str, float]], theirs: Mapping[int, Mapping[str, float]]
) -> tuple[list[int], Summary]:
    """The seeds that both have, and the summary over them of ours minus theirs."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return [], {}
    return seeds, summarise([{name: ours[seed][name] - theirs[seed][name] for name in METRICS} for seed in seeds])


def mean_and_deviation(stack: Tensor) -> tuple[Tensor, Tensor]:
    """Over the first axis; the deviation of one is 0."""
    deviation = stack.std(0) if len(stack) > 1 else torch.zeros_like(stack[0])
    return stack.mean(0), deviation
