"""The mean relative gain of a method over single-task training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ....methods.methods import Method
from ...study import Setting, Study
from ...tables import lower_is_better
from .options import SINGLE_TASK


def delta_m(ours: Mapping[str, Any], single: Mapping[str, Any], metrics: Sequence[str]) -> float:
    """Delta-m in per cent, above 0 where the tasks gain on average (Maninis, Radosavovic and Kokkinos, CVPR 2019, eq. 3) ::

        100 / T * sum_t (-1)^l_t (ours_t - single_t) / single_t,    l_t = 1 where lower is better

    Args:
        ours, single: ``{task: {metric: value}}`` of the method and of single-task training.
        metrics: each task counts once, by the first of them that it has; the paper has one for each task, too.

    Returns:
        NaN where no task can be compared, or one that single-task can measure has no figure (a training that diverged).
        Tasks whose single-task figure is unknown, or not above 0, are left out.
    """
    gains = []
    for task, theirs in single.items():
        metric = next((name for name in metrics if name in theirs), None)
        base = None if metric is None else theirs[metric]
        if metric is None or base is None or not base > 0:
            continue
        value = ours.get(task, {}).get(metric)
        sign = -1 if lower_is_better(metric) else 1
        gains.append(math.nan if value is None else 100 * sign * (value - base) / base)
    return statistics.fmean(gains) if gains else math.nan


def delta_m_of(study: Study, setting: Setting, method: Method, metrics: Sequence[str]) -> dict[int, float]:
    """The same for each seed that both have; empty for single-task itself, and where the study is without it."""
    if method.key == SINGLE_TASK or SINGLE_TASK not in setting.methods:
        return {}
    single = study.reported(setting, study.methods[SINGLE_TASK])
    return {
        seed: delta_m(result.get("scores") or {}, single[seed].get("scores") or {}, metrics)
        for seed, result in study.reported(setting, method).items()
        if seed in single
    }


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """NaN where there are too few values, or one of them is unknown."""
    if not values or any(map(math.isnan, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan
