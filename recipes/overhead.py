"""What the regularizer and gradient surgery cost: step time and peak memory beside the plain step and other ways.

Times are process CPU times (all threads added up) of interleaved steps, compared step by step, so that a machine whose
speed drifts does not decide the result.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .benchmarks.collectives import collective_rows
from .benchmarks.command import add_timing_options, run_timings
from .benchmarks.costs import cost_rows
from .benchmarks.memory import print_peak_memory
from .benchmarks.steps import FAST, SLOW
from .benchmarks.table import collective_table, cost_table
from .runs.command_line import add_number, whole_number
from .runtime.errors import need


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write results.json, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.processes > 1 and not (dist.is_available() and dist.is_gloo_available()):
        parser.error(
            "argument --processes: this build of torch has no gloo. Use --processes 1, or install another one."
        )
    for module in ("numpy", "tqdm", *["torchjd"] * (options.processes == 1)):
        need(module)
    if options.memory_of is not None:
        torch.set_num_threads(options.threads)
        print_peak_memory(options)
        return 0
    measure: Callable[[int, argparse.Namespace], list[dict[str, Any]]]
    measure, table = (cost_rows, cost_table) if options.processes == 1 else (collective_rows, collective_table)
    measurements = (measure(tasks, options) for tasks in options.tasks)
    return run_timings(options, measurements, functools.partial(table, options=options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.overhead", description=__doc__)
    add_timing_options(
        parser,
        Path("runs/overhead"),
        tasks=(3, 10, 40, 200),
        samples="images",
        steps=100,
        warmup=3,
        batch_size=32,
    )
    text = "from 2 on: time the regularizer's collectives in N processes under DistributedDataParallel instead"
    add_number(parser, "--processes", 1, text)
    text = "counted steps of the published loop and of surgery on the parameters, 0 for none"
    add_number(parser, "--slow-steps", 10, text, whole_number(0))
    add_number(parser, "--max-tasks-per-step", 40, "beyond so many tasks, a sample")
    add_number(parser, "--size", 64, "side of the images")
    add_number(parser, "--width", 64, "channels of the first stage; 64 is ResNet-18")
    text = "leave out the peak memory, which takes a process for each figure and Linux"
    parser.add_argument("--no-memory", action="store_true", help=text)
    parser.add_argument("--memory-of", choices=("plain", *FAST, *SLOW), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
