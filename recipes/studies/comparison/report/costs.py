"""What a method costs: parameters, time of a step, peak memory."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from ....methods.methods import Method
from ...study import Setting, Study


@dataclass(frozen=True)
class Costs:
    """Each ``None`` where it was not measured.

    Attributes:
        parameters: how many are trained.
        step: the time of a step over that of the baseline with the same seed: the median over the seeds.
        peak_memory: the most bytes, over the seeds.
    """

    parameters: int | None = None
    step: float | None = None
    peak_memory: int | None = None


def costs_of(study: Study, setting: Setting, method: Method) -> Costs:
    """Read them from ``"costs"`` of the results: ``"parameters"``, ``"seconds_per_step"`` and ``"peak_memory"``.

    Times are compared within a seed alone: other seeds may have been trained on another day, or machine.
    """
    baseline = study.methods[study.baseline]
    ours, theirs = (
        {seed: result.get("costs") or {} for seed, result in study.reported(setting, own).items()}
        for own in (method, baseline)
    )
    base = theirs if study.baseline in setting.methods else {}
    steps = [
        own["seconds_per_step"] / base[seed]["seconds_per_step"]
        for seed, own in ours.items()
        if own.get("seconds_per_step") and base.get(seed, {}).get("seconds_per_step")
    ]
    memory, parameters = (
        [own[name] for own in ours.values() if own.get(name) is not None] for name in ("peak_memory", "parameters")
    )
    return Costs(max(parameters, default=None), statistics.median(steps) if steps else None, max(memory, default=None))


def count_text(count: float | None) -> str:
    """A number of parameters: ``950``, ``12.3 k``, ``4.56 M``."""
    if count is None:
        return "-"
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{_three(count / factor)} {unit}"
    return f"{count:g}"


def memory_text(size: float | None) -> str:
    """Bytes as MiB, or GiB."""
    if size is None:
        return "-"
    return f"{_three(size / 2**30)} GiB" if size >= 2**30 else f"{_three(size / 2**20)} MiB"


def step_text(ratio: float | None) -> str:
    """A ratio of times."""
    return "-" if ratio is None or math.isnan(ratio) else f"{ratio:.2f}"


def _three(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
