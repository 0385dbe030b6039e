"""What the commands that time steps have in common: their options, and the run from the first measurement to the table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..runs.command_line import add_number, folder_name, whole_number
from ..runtime.files import machine, new_run_folder, now, versions, write_json

SCHEMA_VERSION = 1


def add_timing_options(
    parser: argparse.ArgumentParser,
    folder: Path,
    *,
    tasks: Sequence[int],
    samples: str,
    called: str = "tasks",
    steps: int = 10,
    warmup: int = 2,
    batch_size: int = 8,
) -> None:
    """Add the options that do not depend on the models. A batch has ``samples``, and the tasks are ``called`` so."""
    parser.add_argument(
        "--tasks",
        type=whole_number(1),
        nargs="+",
        default=[*tasks],
        metavar="T",
        help=f"numbers of {called} (default: {' '.join(map(str, tasks))})",
    )
    add_number(parser, "--steps", steps, "counted steps of each kind")
    add_number(parser, "--warmup", warmup, "steps before that")
    add_number(parser, "--batch-size", batch_size, f"{samples} per step")
    add_number(parser, "--threads", 1, "of torch; one is the least noisy")
    parser.add_argument("--out", type=Path, default=folder, metavar="FOLDER", help=f"where runs go (default: {folder})")
    parser.add_argument("--name", type=folder_name, help="of the run's folder (default: the present time)")


def run_timings(
    options: argparse.Namespace,
    measurements: Iterable[list[dict[str, Any]]],
    table: Callable[[Sequence[dict[str, Any]]], str],
    batch_below: bool = False,
) -> int:
    """Measure, write results.json after each measurement, print the table, and return the exit code.

    Args:
        options: of :func:`add_timing_options`.
        measurements: rows. Each measurement begins when it is asked for.
        table: of all rows.
        batch_below: says below the table how large a batch was, and how many threads worked on it.
    """
    torch.set_num_threads(options.threads)
    folder = new_run_folder(options.out, options.name)
    rows: list[dict[str, Any]] = []
    result = {
        "schema_version": SCHEMA_VERSION,
        "date": now(),
        "options": {key: value for key, value in vars(options).items() if key not in ("out", "memory_of")},
        "versions": versions(),
        "machine": machine(),
        "rows": rows,
    }
    try:
        for found in measurements:
            rows += found
            write_json(folder / "results.json", result)
    except KeyboardInterrupt:
        print("\nInterrupted; what follows is what was finished.")
    below = f"Batch {options.batch_size}, {options.threads} thread(s). " if batch_below else ""
    print(f"{table(rows)}\n\n{below}Written to {folder}: results.json")
    return 0
