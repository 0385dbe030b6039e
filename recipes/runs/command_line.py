"""Command lines: kinds of arguments, options from dataclasses, and errors that say what to use instead."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from ..methods.methods import BASELINE, HARD_SHARING, METHODS, Methods
from ..runtime.errors import RecipeError
from ..runtime.processes import launched_precision
from ..training.options import Options

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
DEFAULT_METHOD = "srdml_default"
DEFAULT_STRENGTH = 0.03
ACTIVATIONS = ("gelu", "relu", "tanh", "silu")


class Parser(argparse.ArgumentParser):
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
    """The kind of an argument: a whole number from here on."""

    def parse(text: str) -> int:
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"found {text!r}. Pass a whole number from {least} on, such as {least + 2}.")

    return parse


def real_number(above_zero: bool) -> Callable[[str], float]:
    """The kind of an argument: a finite number above zero, or from zero on."""

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


COUNT, POSITIVE, NON_NEGATIVE = whole_number(1), real_number(above_zero=True), real_number(above_zero=False)


def folder_name(text: str) -> str:
    """The kind of an argument: a plain name of a folder."""
    if text in ("", ".", "..") or Path(text).name != text or "\\" in text:
        raise argparse.ArgumentTypeError(f"found {text!r}. Pass a plain folder name, such as first-run.")
    return text


def method_name(text: str, methods: Methods = METHODS) -> str:
    """The kind of an argument: a method, by its name or an earlier one; or a family of methods."""
    if text in methods.families:
        return text
    try:
        known = text in methods
    except RecipeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not known:
        near = difflib.get_close_matches(text, methods, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise argparse.ArgumentTypeError(f"found {text!r}.{hint} Use one of {', '.join(methods)}{methods.hint}.")
    return methods.name_of(text)


def add_number(group: Any, name: str, default: float | None, text: str, kind: Callable[[str], float] = COUNT) -> None:
    """Add an option with a number, whose help tells its default."""
    metavar = "X" if kind in (POSITIVE, NON_NEGATIVE) else "N"
    shown = "" if default is None else f" (default: {default:g})"
    group.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text}{shown}")


def add_choice(group: Any, name: str, choices: Sequence[str], default: str, text: str) -> None:
    """Add an option with one of some texts, whose help tells its default."""
    group.add_argument(name, choices=list(choices), default=default, help=f"{text} (default: {default})")


def add_options(
    groups: dict[str, Any], *, samples: str = "samples", leave_out: Sequence[str] = (), **defaults: Any
) -> None:
    """Add what :class:`~recipes.training.options.Options` has.

    Args:
        groups: of an argument parser, by the names ``"steps"``, ``"method"`` and ``"run"``; options of others are left out.
        samples: what they are called.
        leave_out: names of options.
        defaults: of this recipe; ``None`` for one that depends on others.
    """
    defaults.setdefault("mixed_precision", launched_precision())
    for field in dataclasses.fields(Options):
        of, name = field.metadata, "--" + field.name.replace("_", "-")
        if not of or of["group"] not in groups or field.name in leave_out:
            continue
        group, default = groups[of["group"]], defaults.get(field.name, field.default)
        text = of["text"].format(samples=samples)
        if of["choices"]:
            add_choice(group, name, of["choices"], default, text)
        elif isinstance(of["least"], int):
            add_number(group, name, default, text, whole_number(of["least"]))
        else:
            add_number(group, name, default, text, POSITIVE if of["above"] is not None else NON_NEGATIVE)
    if "run" in groups:
        groups["run"].add_argument(
            "--trackers",
            nargs="+",
            choices=list(TRACKERS),
            default=[],
            metavar="NAME",
            help=f"some of {', '.join(TRACKERS)}",
        )


def options_from(options: argparse.Namespace, **more: Any) -> Options:
    """The options of a training that a command line has, and others."""
    names = {field.name for field in dataclasses.fields(Options)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return Options(**{**given, "trackers": tuple(given.get("trackers", ())), **more})


def single_run_options(options: argparse.Namespace, **more: Any) -> Options:
    """The same for a recipe that trains one model, and tells how it goes."""
    at_once = min(500, 4 * options.batch_size)
    return options_from(options, evaluation_batch_size=at_once, log_steps=50, progress=True, **more)


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
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
    check_precision(parser, options)
    for tracker in options.trackers:
        try:
            importlib.import_module(tracker)
        except ImportError as error:
            package = TRACKERS[tracker]
            parser.error(
                f"argument --trackers: {tracker} needs the package {package}, which could not be imported ({error}). Run: "
                f"pip install {package}"
            )


def check_precision(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse fp16 where there is no GPU."""
    if options.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error(
            "argument --mixed-precision: fp16 needs a GPU, and none was found. Use --mixed-precision bf16, or no."
        )


def add_head(model: Any, width: int, *, activation: bool = True) -> None:
    """Add what each head is made of; ``width`` is the default of its hidden layer."""
    text = "of the hidden layer in each head; 0 for linear heads"
    add_number(model, "--head-width", width, text, whole_number(0))
    if activation:
        text = "in the heads; with relu, as in the paper, the penalty is blind to the backbone"
        add_choice(model, "--activation", ACTIVATIONS, "gelu", text)


def add_method(method: Any) -> None:
    """Add which method, and how strong its penalty is."""
    method.add_argument(
        "--method",
        type=method_name,
        default=DEFAULT_METHOD,
        metavar="METHOD",
        help=f"one of {', '.join(METHODS)} (default: {DEFAULT_METHOD})",
    )
    add_strength(method, DEFAULT_STRENGTH)


def add_strength(method: Any, default: float) -> None:
    """Add that of the penalty; ``None`` if it is not given, so that methods without one can refuse it."""
    text = f"of the penalty, for methods that have one (default: {default:g})"
    add_number(method, "--strength", None, text, NON_NEGATIVE)


def check_method(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what the method does not have."""
    method = METHODS[options.method]
    if method.architecture != HARD_SHARING or method.frozen:
        parser.error(
            f"argument --method: {options.method} is more than a training of this model. Use it in recipes.compare."
        )
    if not method.tuned and options.strength is not None:
        parser.error(
            f"argument --strength: {options.method} holds the penalty at a share of the losses. Leave it out, or use "
            "--method srdml."
        )
    if method.rule != "entropic" and options.temperature is not None:
        parser.error(f"argument --temperature: {options.method} does not have the entropic rule. Leave it out.")
    if method.penalty is None and options.strength is not None:
        parser.error(f"argument --strength: {options.method} has no penalty. Leave it out.")
    if options.method == BASELINE and options.pretraining_epochs:
        parser.error(
            "argument --pretraining-epochs: hard sharing is what would come before. Use more --epochs instead."
        )


def method_value(options: argparse.Namespace) -> Any:
    """The value of what the method tunes, or what one that is not tuned has."""
    method = METHODS[options.method]
    if method.penalty is None:
        return float(options.weight_decay)
    if method.fixed is not None:
        return method.fixed
    return DEFAULT_STRENGTH if options.strength is None else float(options.strength)


def add_labelled(data: Any) -> None:
    """Add how many labels are known."""
    add_number(data, "--labelled", 1.0, "share of the training labels that is kept, drawn for each of them", POSITIVE)


def add_folder(run: Any, recipe: str) -> None:
    """Add where the run is written."""
    run.add_argument(
        "--out", type=Path, default=Path("runs", recipe), metavar="FOLDER", help=f"of all runs (default: runs/{recipe})"
    )
    run.add_argument("--name", type=folder_name, help="of this run's folder in it (default: date and time)")
    run.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|FOLDER",
        help="auto goes on with the run of this --name from its latest checkpoint, if there is one; FOLDER is that of the "
        "run (default: never)",
    )
