"""F1 of many binary tasks, at a threshold that was chosen on validation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["best_threshold", "f1_scores", "with_f1"]


def f1_scores(logits: Tensor, labels: Tensor, threshold: float) -> list[float]:
    """Of each task; 0 where a task with true labels is never predicted, NaN where it has none.

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

    One for all: a threshold of its own for an emotion with four validation texts would be noise.
    """
    candidates: list[float] = torch.linspace(0.02, 0.98, 49).logit().tolist()
    return max(candidates, key=lambda threshold: _macro(f1_scores(logits, labels, threshold)))


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
        "f1": _macro(list(values.values())),
        "f1_rare": _macro([values[task] for task in rare]),
        "auc_rare": _macro([scores[task]["auc"] for task in rare]),
        "threshold": float(torch.tensor(threshold, dtype=torch.float64).sigmoid()),
    }


def _macro(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan
