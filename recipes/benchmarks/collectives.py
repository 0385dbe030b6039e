"""What the regularizer's collectives cost in steps of several processes under DistributedDataParallel.

The regularizer is given a process group, and what is called in that group is timed: from when the last process came until
the last one left, so that waiting for the slower one does not count. A barrier in another group stands before each call.
The processes are on one machine, whose clock they share.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ..runtime.errors import RecipeError
from ..runtime.tables import aligned
from .step_statistics import interval, median, ratio
from .steps import make_distributed_steps

__all__ = ["TimedCollectives", "collective_row", "collective_rows", "collective_table"]

LABELS = {"regularizer": "with the regularizer", "regularizer_surgery": "regularizer w/ PCGrad (feature)"}
#: Of ``torch.distributed``, as the package calls them.
COLLECTIVES = ("all_reduce", "broadcast", "all_gather_object")
_TIMED = "_timed"
_TITLES = (
    "step",
    "tasks",
    "steps",
    "calls",
    "ms inside",
    "% of plain step",
    "% of this step",
    "CPU % of plain step",
    "time / local",
    "CPU time / local",
)


def collective_rows(tasks: int, most: int | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the processes, measure, and return a row for each kind of step.

    Raises:
        RecipeError: the step called no collective in the group that it was given.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Daemons end with this process, also by Ctrl-C; if one fails, the others are ended and its traceback is raised.
        spawn(  # type: ignore[no-untyped-call]
            _measure, (folder, tasks, most, options), nprocs=options.processes, daemon=True
        )
        found = json.loads((Path(folder) / "found.json").read_text())
    return [collective_row(name, tasks, most, found) for name in LABELS]


def collective_table(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """The rows as text."""
    cells = [[*_TITLES]]
    for row in rows:
        label = LABELS[row["step"]]
        if row["max_tasks_per_step"] is not None:
            label += f", {row['max_tasks_per_step']} sampled"
        numbers = [row["tasks"], row["steps_counted"], row["collectives_per_step"]]
        milliseconds = f"{1000 * row['median_seconds_in_collectives']:.2f}"
        shares = [_percent(row[name]) for name in ("share_of_plain", "share_of_step", "cpu_share_of_plain")]
        ratios = [interval(row[name]) for name in ("ratio_to_local", "cpu_ratio_to_local")]
        cells.append([label, *map(str, numbers), milliseconds, *shares, *ratios])
    lines = [
        f"ResNet-18 shape (width {options.width}) at {options.size}x{options.size}, two-layer heads, in {options.processes} "
        "gloo processes under",
        f"DistributedDataParallel, each with a batch of {options.batch_size} and {options.threads} thread(s).",
        "Inside the regularizer's collectives: time from the last process coming to the last one leaving, and CPU time.",
        "Step with them over the step without (process_group='local') next to it, waiting included. Median [95 % interval].",
        aligned(cells, left=1),
    ]
    if rows:
        largest = max(row["share_of_plain"]["median"] for row in rows)
        lines.append(
            f"At most {100 * largest:.2f} % of a plain step's time is spent inside the regularizer's collectives."
        )
    return "\n".join(lines)


def _percent(share: dict[str, float]) -> str:
    return f"{100 * share['median']:.2f} [{100 * share['low']:.2f}, {100 * share['high']:.2f}]"


class TimedCollectives:
    """What this process calls in one process group of torch.distributed, timed after a barrier.

    Every process has to make one at the same time.

    Args:
        group: where the calls that count are made. A group over the same processes is made for the barriers.

    Attributes:
        calls: of each call, in their order: when it came to the barrier, began and ended, and its CPU seconds.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._waiting: Any = dist.new_group()
        self.calls: list[tuple[float, float, float, float]] = []

    def wait(self) -> None:
        """Until all processes are here."""
        dist.barrier(self._waiting)

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Within, calls in the group are timed."""
        plain = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in plain.items():
            setattr(dist, name, self._timed(function))
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(dist, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if options.get("group") is not self._group:
                return function(*args, **options)
            came = time.perf_counter()
            self.wait()
            began, cpu_began = time.perf_counter(), time.process_time()
            result = function(*args, **options)
            ended, cpu_ended = time.perf_counter(), time.process_time()
            self.calls.append((came, began, ended, cpu_ended - cpu_began))
            return result

        return call


def _measure(rank: int, folder: str, tasks: int, most: int | None, options: argparse.Namespace) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(options.threads)
    logging.getLogger("saliency_reg").setLevel(logging.ERROR)
    # Of DistributedDataParallel, about speed: second derivatives are laid out in another way than first ones.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=options.processes)
    group = dist.new_group()
    collectives = TimedCollectives(group)
    steps = make_distributed_steps(tasks, options.batch_size, options.size, options.width, most, group)
    found = _interleaved(steps, collectives, tasks, options, quiet=rank > 0)
    everywhere: list[Any] = [None] * options.processes
    dist.all_gather_object(everywhere, found)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(everywhere))
    dist.destroy_process_group()


def _end_with_parent() -> None:
    # torch sends a Ctrl-C for that, which a run in the background of a shell script ignores.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _interleaved(
    steps: dict[str, Callable[[], None]],
    collectives: TimedCollectives,
    tasks: int,
    options: argparse.Namespace,
    quiet: bool,
) -> dict[str, Any]:
    """Steps of each kind, one after the other in an order that turns; those with collectives also while these are timed."""
    from tqdm import tqdm

    names = [name + suffix for name in steps for suffix in ("", *[_TIMED] * (name in LABELS))]
    found: dict[str, Any] = {name: {"seconds": [], "cpu_seconds": [], "calls": []} for name in names}
    rounds = tqdm(range(options.steps + options.warmup), desc=f"{tasks} tasks", disable=True if quiet else None)
    for round_ in rounds:
        for place in range(len(names)):
            name = names[(place + round_) % len(names)]
            collectives.calls = []
            timing = collectives.timing() if name.endswith(_TIMED) else contextlib.nullcontext()
            collectives.wait()
            with timing:
                before, cpu_before = time.perf_counter(), time.process_time()
                steps[name.removesuffix(_TIMED)]()
                seconds, cpu_seconds = time.perf_counter() - before, time.process_time() - cpu_before
            if round_ >= options.warmup:
                found[name]["seconds"].append(seconds)
                found[name]["cpu_seconds"].append(cpu_seconds)
                found[name]["calls"].append(collectives.calls)
    return found


def collective_row(name: str, tasks: int, most: int | None, everywhere: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the processes found about one kind of step.

    Raises:
        RecipeError: it called no collective in the group that it was given.
    """
    calls = {len(step) for found in everywhere for step in found[name + _TIMED]["calls"]}
    if calls == {0}:
        raise RecipeError(
            f"the step {name!r} called none of {', '.join(COLLECTIVES)} with the group that it was given. Look at how "
            "saliency_reg/distributed/ranks.py calls them, and name those functions in recipes/overhead_processes.py."
        )
    # Of each step, of each process, of each call: when it came, began and ended, and its CPU seconds.
    by_step = list(zip(*(found[name + _TIMED]["calls"] for found in everywhere)))
    inside = [sum(_shared_seconds(own) for own in zip(*step)) for step in by_step]
    cpu_inside = [sum(call[3] for own in step for call in own) / len(step) for step in by_step]
    waited = [sum(call[1] - call[0] for own in step for call in own) / len(step) for step in by_step]

    def mean(kind: str, field: str) -> list[float]:
        return [sum(own) / len(own) for own in zip(*(found[kind][field] for found in everywhere))]

    return {
        "tasks": tasks,
        "max_tasks_per_step": most,
        "step": name,
        "processes": len(everywhere),
        "steps_counted": len(inside),
        "collectives_per_step": max(calls),
        "median_seconds": median(mean(name, "seconds")),
        "median_seconds_of_plain": median(mean("plain", "seconds")),
        "median_seconds_in_collectives": median(inside),
        "median_seconds_waited_before": median(waited),
        "share_of_plain": ratio(inside, mean("plain", "seconds")),
        "share_of_step": ratio(inside, mean(name, "seconds")),
        "cpu_share_of_plain": ratio(cpu_inside, mean("plain", "cpu_seconds")),
        "ratio_to_local": ratio(mean(name, "seconds"), mean(f"{name}_local", "seconds")),
        "cpu_ratio_to_local": ratio(mean(name, "cpu_seconds"), mean(f"{name}_local", "cpu_seconds")),
        "ratio_to_plain": ratio(mean(name, "seconds"), mean("plain", "seconds")),
    }


def _shared_seconds(calls: Sequence[tuple[float, float, float, float]]) -> float:
    """Of one call in all processes: from when the last one came until the last one left."""
    return max(ended for _, _, ended, _ in calls) - max(began for _, began, _, _ in calls)
