"""What each kind of step costs in one process: its time and peak memory beside those of the plain step."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ..runtime.errors import need
from .memory import peak_memory
from .steps import FAST, SLOW, TAG_EVERY, VARIANTS, make_steps, tasks_sampled
from .timing import Times, compared, in_blocks, median, ratio, time_in_turn

#: Up to this many tasks the published loop and surgery on the parameters are timed; beyond, a step takes minutes.
MOST_TASKS_OF_SLOW_STEPS = 10


def cost_rows(tasks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure with so many tasks, and return a row for each kind of step."""
    sampled = tasks_sampled(tasks, options)

    def time(names: Sequence[str], count: int, variant: str | None = None) -> dict[str, Times]:
        return time_in_turn(make_steps(names, tasks, options, variant), count, options.warmup, f"{tasks} tasks")

    def row(name: str, times: Mapping[str, Times], variant: str | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {"tasks": tasks, "max_tasks_per_step": sampled, "step": name, "variant": variant}
        found |= compared(times, name)
        if "floor" in times and name.startswith("regularizer"):
            found["ratio_to_floor"] = ratio(times[name].cpu_seconds, times["floor"].cpu_seconds)
        if name == "views":
            own, without = (in_blocks(times[one].cpu_seconds, TAG_EVERY) for one in (name, "regularizer"))
            found["ratio_to_regularizer"] = ratio(own, without)
        if variant is None and memory:
            found["peak_memory_mib"] = memory[name]
            found["memory_ratio_to_plain"] = memory[name] / max(memory["plain"], 1.0)
        return found

    times = time(["plain", *FAST], options.steps)
    memory = peak_memory(times, tasks, options)
    rows = [row(name, times) for name in FAST]
    for variant in ["heads_alone"] if sampled is not None else ["linear", "two-layer"]:
        count = options.steps if variant == "heads_alone" else max(options.steps // 2, 1)
        times = time(["plain", *VARIANTS[variant]], count, variant)
        rows += [row(name, times, variant) for name in VARIANTS[variant]]
    if tasks <= MOST_TASKS_OF_SLOW_STEPS and options.slow_steps > 0:
        times = time(["plain", "regularizer", *SLOW], options.slow_steps)
        memory |= peak_memory(SLOW, tasks, options)
        slow = {name: row(name, times) for name in SLOW}
        numpy = need("numpy")
        plain, own, loop = (numpy.asarray(times[name].cpu_seconds) for name in ("plain", "regularizer", "loop"))
        slow["loop"]["own_cost_over_regularizer"] = median(loop - plain) / max(median(own - plain), 1e-9)
        slow["parameters"]["ratio_to_torchjd"] = ratio(times["parameters"].cpu_seconds, times["torchjd"].cpu_seconds)
        rows += slow.values()
    return rows
