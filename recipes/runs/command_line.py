"""Kinds of command-line arguments, with errors that say what to use instead."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from ..runtime.processes import PRECISIONS, launched_precision

__all__ = [
    "OneVoiceParser",
    "add_training_arguments",
    "check_training_arguments",
    "folder_name",
    "real_number",
    "whole_number",
]

#: What accelerate calls a tracker, which is also the module, to its package.
TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "aim": "aim",
    "comet_ml": "comet-ml",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
#: A launcher ends all processes as soon as one has failed: the silent ones leave the first one time to speak.
SECONDS_OF_SILENCE = 2.0


class OneVoiceParser(argparse.ArgumentParser):
    """Of the processes that a launcher starts, only the first one prints; the others end with the same code."""

    def error(self, message: str) -> NoReturn:
        if not _speaks():
            time.sleep(SECONDS_OF_SILENCE)
            self.exit(2)
        super().error(message)

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        if _speaks():
            super().print_help(file)


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def whole_number(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"found {text!r}. Pass a whole number from {least} on, such as {least + 2}.")

    return parse


def real_number(above_zero: bool) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and (value > 0 or (value == 0 and not above_zero)):
            return value
        least = "above 0" if above_zero else "from 0 on"
        raise argparse.ArgumentTypeError(f"found {text!r}. Pass a finite number {least}, such as 0.1.")

    return parse


def folder_name(text: str) -> str:
    if text in ("", ".", "..") or Path(text).name != text or "\\" in text:
        raise argparse.ArgumentTypeError(f"found {text!r}. Pass a plain folder name, such as first-run.")
    return text


def add_training_arguments(steps: Any, run: Any, *, formats: bool = True, checkpoint_steps: int = 0) -> None:
    """Add the options that every recipe on the engine has.

    Args:
        steps: group of an argument parser for what a step is.
        run: group for what the numbers do not depend on.
        checkpoint_steps: default of ``--checkpoint-steps``.
        formats: whether there is another one than float32 for weights and data.
    """
    if formats:
        steps.add_argument(
            "--dtype", choices=["float32", "float64"], default="float32", help="of weights and data (default: float32)"
        )
    steps.add_argument(
        "--accumulation",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="micro-batches that a batch is split into, to save memory (default: 1)",
    )
    steps.add_argument(
        "--mixed-precision",
        choices=PRECISIONS,
        default=launched_precision(),
        help="fp16 needs a GPU (default: no, or what accelerate launch was told)",
    )
    steps.add_argument(
        "--clip-norm",
        type=real_number(above_zero=True),
        metavar="X",
        help="largest norm of the gradients (default: none)",
    )
    run.add_argument(
        "--data-workers",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="processes that load data, for each that trains (default: 0: it loads itself)",
    )
    run.add_argument(
        "--checkpoint-steps",
        type=whole_number(0),
        default=checkpoint_steps,
        metavar="N",
        help="steps between the checkpoints of a training; 0 for none but the one that SIGTERM asks for (default: "
        f"{checkpoint_steps})",
    )
    run.add_argument(
        "--trackers",
        nargs="+",
        choices=list(TRACKERS),
        default=[],
        metavar="NAME",
        help=f"some of {', '.join(TRACKERS)}",
    )


def check_training_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot go together."""
    if options.accumulation > options.batch_size:
        parser.error(
            f"argument --accumulation: a batch of {options.batch_size} cannot be split into {options.accumulation} "
            f"micro-batches. Use --accumulation {options.batch_size} or less."
        )
    if options.mixed_precision != "no" and getattr(options, "dtype", "float32") == "float64":
        parser.error(
            f"argument --mixed-precision: {options.mixed_precision} would take the digits that --dtype float64 gives. Use "
            "--mixed-precision no, or --dtype float32."
        )
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error(
            "argument --mixed-precision: fp16 needs a GPU, and none was found. Use --mixed-precision bf16, or no."
        )
    for tracker in options.trackers:
        try:
            importlib.import_module(tracker)
        except ImportError as error:
            package = TRACKERS[tracker]
            parser.error(
                f"argument --trackers: {tracker} needs the package {package}, which could not be imported ({error}). Run: "
                f"pip install {package}"
            )
