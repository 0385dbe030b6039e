"""What the regularizer's collectives cost in steps of several processes under DistributedDataParallel.

The regularizer is given a process group, and what is called in that group is timed: from when the last process came until
the last one left, so that waiting for the slower one does not count. A barrier in another group stands before each call.
The processes are on one machine, whose clock they share.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
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
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ..runtime.errors import RecipeError, need
from .steps import make_steps, tasks_sampled
from .timing import median, ratio, time_in_turn

WITH_COLLECTIVES = ("regularizer", "regularizer_surgery")
KINDS = ("plain", "regularizer_local", "regularizer", "regularizer_surgery_local", "regularizer_surgery")
#: Of ``torch.distributed``, as the package calls them.
COLLECTIVES = ("all_reduce", "broadcast", "all_gather_object")
#: Behind the name of a kind: its collectives are timed, and its barriers make the step itself slower.
_TIMED = "_timed"


def collective_rows(tasks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start the processes, measure, and return a row for each kind of step.

    Raises:
        RecipeError: the step called no collective in the group that it was given.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Daemons end with this process, also by Ctrl-C; if one fails, the others are ended and its traceback is raised.
        spawn(_measure, (folder, tasks, options), nprocs=options.processes, daemon=True)  # type: ignore[no-untyped-call]
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(options.processes)]
    return [collective_row(name, tasks, tasks_sampled(tasks, options), found) for name in WITH_COLLECTIVES]


@contextlib.contextmanager
def timed_collectives(group: Any, waiting: Any) -> Iterator[list[tuple[float, float, float, float]]]:
    """Time what this process calls in one process group of torch.distributed, each time after a barrier in another group.

    Yields a list, to which each call adds when it came to the barrier, began and ended, and its CPU seconds.
    """
    calls: list[tuple[float, float, float, float]] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if options.get("group") is not group:
                return function(*args, **options)
            came = time.perf_counter()
            dist.barrier(waiting)
            began, cpu_began = time.perf_counter(), time.process_time()
            result = function(*args, **options)
            ended, cpu_ended = time.perf_counter(), time.process_time()
            calls.append((came, began, ended, cpu_ended - cpu_began))
            return result

        return call

    replaced: dict[str, Any] = {name: timed(getattr(dist, name)) for name in COLLECTIVES}
    with mock.patch.multiple(dist, **replaced):
        yield calls


def _measure(rank: int, folder: str, tasks: int, options: argparse.Namespace) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(options.threads)
    logging.getLogger("saliency_reg").setLevel(logging.ERROR)
    # Of DistributedDataParallel, about speed: second derivatives are laid out in another way than first ones.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=options.processes)
    found = _times_and_calls(tasks, options, quiet=rank > 0)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _end_with_parent() -> None:
    # torch sends a Ctrl-C for that, which a run in the background of a shell script ignores.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _times_and_calls(tasks: int, options: argparse.Namespace, quiet: bool) -> dict[str, dict[str, Any]]:
    group: Any = dist.new_group()
    waiting: Any = dist.new_group()
    steps = make_steps(KINDS, tasks, options, group=group)
    calls: dict[str, list[Any]] = {name: [] for name in WITH_COLLECTIVES}

    def timed_step(name: str) -> None:
        with timed_collectives(group, waiting) as own:
            steps[name]()
        calls[name].append(own)

    timed = {name + _TIMED: functools.partial(timed_step, name) for name in WITH_COLLECTIVES}
    wait = functools.partial(dist.barrier, waiting)
    times = time_in_turn(
        {**steps, **timed}, options.steps, options.warmup, f"{tasks} tasks", before_each=wait, quiet=quiet
    )
    found: dict[str, dict[str, Any]] = {name: dataclasses.asdict(own) for name, own in times.items()}
    for name, own in calls.items():
        found[name + _TIMED]["calls"] = own[options.warmup :]
    return found


def collective_row(name: str, tasks: int, sampled: int | None, everywhere: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the processes found about one kind of step.

    Raises:
        RecipeError: it called no collective in the group that it was given.
    """
    numpy = need("numpy")
    # For each step an array [process, call, 4]: when the call came, began and ended, and its CPU seconds.
    steps = [numpy.asarray(step) for step in zip(*(found[name + _TIMED]["calls"] for found in everywhere))]
    most_calls = max(step.shape[1] for step in steps)
    if most_calls == 0:
        raise RecipeError(
            f"the step {name!r} called none of {', '.join(COLLECTIVES)} with the group that it was given. Look at how "
            "saliency_reg/distributed/ranks.py calls them, and name those functions in recipes/benchmarks/collectives.py."
        )
    # From when the last process came until the last one left.
    inside = [(step[..., 2].max(axis=0) - step[..., 1].max(axis=0)).sum() for step in steps]
    cpu_inside = [step[..., 3].sum() / len(everywhere) for step in steps]
    waited = [(step[..., 1] - step[..., 0]).sum() / len(everywhere) for step in steps]

    def mean(kind: str, field: str = "seconds") -> Any:
        return numpy.mean([found[kind][field] for found in everywhere], axis=0)

    return {
        "tasks": tasks,
        "max_tasks_per_step": sampled,
        "step": name,
        "processes": len(everywhere),
        "steps_counted": len(steps),
        "collectives_per_step": most_calls,
        "median_seconds": median(mean(name)),
        "median_seconds_of_plain": median(mean("plain")),
        "median_seconds_in_collectives": median(inside),
        "median_seconds_waited_before": median(waited),
        "share_of_plain": ratio(inside, mean("plain")),
        "share_of_step": ratio(inside, mean(name)),
        "cpu_share_of_plain": ratio(cpu_inside, mean("plain", "cpu_seconds")),
        "ratio_to_local": ratio(mean(name), mean(f"{name}_local")),
        "cpu_ratio_to_local": ratio(mean(name, "cpu_seconds"), mean(f"{name}_local", "cpu_seconds")),
        "ratio_to_plain": ratio(mean(name), mean("plain")),
    }
