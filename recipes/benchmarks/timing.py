"""Whole training steps of several kinds, timed in turn, so that they can be compared step by step."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer

from ..runs.command_line import folder_name, whole_number
from ..runtime.errors import need
from ..runtime.files import machine, new_run_folder, now, versions, write_json
from .step_statistics import median, ratio

__all__ = ["add_timing_arguments", "kinds_of", "markdown", "run_timings", "time_steps", "training_step"]

SCHEMA_VERSION = 1
#: Behind the shape of a model, and whether with the regularizer and with surgery.
KINDS = {
    "plain": (False, False),
    "with the regularizer": (True, False),
    "with the regularizer w/ PCGrad (feature)": (True, True),
}


def kinds_of(shapes: Iterable[str]) -> dict[str, tuple[str, bool, bool]]:
    """What is timed: ``{name: (shape of the model, whether with the regularizer, whether with surgery)}``."""
    return {f"{shape}, {label}": (shape, *kind) for shape in shapes for label, kind in KINDS.items()}


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: SaliencyRegularizer | None,
    loss_of: Callable[[], Tensor],
) -> Callable[[], None]:
    """Forward, penalty if there is one, backward and optimizer step."""

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_of()
        if regularizer is not None:
            loss = loss + regularizer()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    model.train()
    return step


def time_steps(
    steps: Mapping[str, Callable[[], None]],
    kinds: Mapping[str, tuple[str, bool, bool]],
    options: argparse.Namespace,
    description: str,
) -> list[dict[str, Any]]:
    """A row for each kind with the regularizer.

    Args:
        steps: by kind.
        kinds: of :func:`kinds_of`.
        options: of :func:`add_timing_arguments`.
        description: in front of the progress.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for round_ in need("tqdm").tqdm(range(options.steps + options.warmup), desc=description, disable=None):
        for place in range(len(names)):
            name = names[(place + round_) % len(names)]
            before = time.process_time()
            steps[name]()
            if round_ >= options.warmup:
                seconds[name].append(time.process_time() - before)
    return [
        {
            "kind": name,
            "steps_counted": options.steps,
            "median_seconds": median(seconds[name]),
            "ratio_to_plain": ratio(seconds[name], seconds[f"{shape}, plain"]),
        }
        for name, (shape, regularizes, _) in kinds.items()
        if regularizes
    ]


def run_timings(
    options: argparse.Namespace,
    measurements: Iterable[Callable[[], list[dict[str, Any]]]],
    table: Callable[[Sequence[dict[str, Any]]], str],
    packages: Mapping[str, str],
) -> int:
    """Measure, write results.json after each measurement, print the table, and return the exit code.

    Args:
        options: of :func:`add_timing_arguments`.
        measurements: that return rows.
        table: of all rows.
        packages: versions beyond those of :func:`recipes.runtime.files.versions`.
    """
    torch.set_num_threads(options.threads)
    logging.getLogger("saliency_reg").setLevel(logging.ERROR)  # linear classifiers are timed on purpose
    folder = new_run_folder(options.out, options.name)
    rows: list[dict[str, Any]] = []
    result = {
        "schema_version": SCHEMA_VERSION,
        "date": now(),
        "options": {key: value for key, value in vars(options).items() if key not in ("out", "name")},
        "versions": {**versions(), **packages},
        "machine": machine(),
        "rows": rows,
    }
    try:
        for measure in measurements:
            rows += measure()
            write_json(folder / "results.json", result)
    except KeyboardInterrupt:
        print("\nInterrupted; what follows is what was finished.")
    print(table(rows))
    print(f"\nBatch {options.batch_size}, {options.threads} thread(s). Written to {folder}: results.json")
    return 0


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in rows])


def add_timing_arguments(parser: argparse.ArgumentParser, samples: str, folder: Path) -> None:
    """Add the options that do not depend on the models.

    Args:
        parser: to which they are added.
        samples: what a batch has.
        folder: of all runs.
    """
    for name, default, text in (
        ("--steps", 10, "counted steps of each kind"),
        ("--warmup", 2, "steps before that"),
        ("--batch-size", 8, f"{samples} per step"),
        ("--threads", 1, "of torch"),
    ):
        parser.add_argument(
            name, type=whole_number(1), default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument("--out", type=Path, default=folder, metavar="FOLDER", help=f"where runs go (default: {folder})")
    parser.add_argument("--name", type=folder_name, help="of the run's folder (default: the present time)")
