"""Steps of several kinds, timed in turn and compared step by step, so that a machine whose speed drifts does not decide."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.errors import need


@dataclass(frozen=True)
class Times:
    """How long each counted step of one kind took: by the clock, and in CPU time of all threads of this process."""

    seconds: list[float]
    cpu_seconds: list[float]


def time_in_turn(
    steps: Mapping[str, Callable[[], None]],
    count: int,
    warmup: int,
    description: str,
    *,
    before_each: Callable[[], object] = lambda: None,
    quiet: bool = False,
) -> dict[str, Times]:
    """Run a step of each kind in every round, in an order that turns, and return the times of ``count`` rounds by kind.

    ``warmup`` rounds come before them. ``before_each`` is called before each step, untimed; ``quiet`` shows no progress.
    """
    names = list(steps)
    times = {name: Times([], []) for name in names}
    for round_ in need("tqdm").tqdm(range(warmup + count), desc=description, disable=True if quiet else None):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            before_each()
            began, cpu_began = time.perf_counter(), time.process_time()
            steps[name]()
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
            if round_ >= warmup:
                times[name].seconds.append(seconds)
                times[name].cpu_seconds.append(cpu_seconds)
    return times


def median(values: Sequence[float]) -> float:
    """Return the median of some numbers."""
    return float(need("numpy").median(values))


def in_blocks(seconds: Sequence[float], size: int) -> list[float]:
    """Return the sums of so many steps each, for a cost that only some steps have; of all of them where there are fewer."""
    whole = range(0, max(len(seconds) - size, 0) + 1, size)
    return [sum(seconds[first : first + size]) for first in whole]


def ratio(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Return the median of the step-by-step ratios, with a 95 % bootstrap interval."""
    numpy = need("numpy")
    ratios = numpy.asarray(seconds) / numpy.asarray(base)
    drawn = numpy.random.default_rng(0).choice(ratios, (9999, len(ratios)))
    low, high = numpy.quantile(numpy.median(drawn, axis=1), [0.025, 0.975])
    return {"median": float(numpy.median(ratios)), "low": float(low), "high": float(high)}


def compared(times: Mapping[str, Times], name: str) -> dict[str, Any]:
    """Return what a row tells about the CPU time of one kind of step, beside the one that is called ``"plain"``."""
    seconds = times[name].cpu_seconds
    return {
        "steps_counted": len(seconds),
        "median_seconds": median(seconds),
        "ratio_to_plain": ratio(seconds, times["plain"].cpu_seconds),
    }
