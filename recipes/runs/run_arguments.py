"""The options of a single training that do not depend on what its samples are."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .command_line import check_training_arguments, folder_name, real_number, whole_number
from ..training.learning_rate import DECAYS
from ..methods.methods import BASELINE, METHODS
from ..training.train import Options

__all__ = [
    "COUNT",
    "NON_NEGATIVE",
    "POSITIVE",
    "add_folder",
    "add_head",
    "add_head_width",
    "add_labelled",
    "add_method",
    "add_number",
    "add_steps",
    "add_strength",
    "check_method_arguments",
    "method_value",
    "training_options",
]

DEFAULT_STRENGTH = 0.03
COUNT, POSITIVE, NON_NEGATIVE = whole_number(1), real_number(above_zero=True), real_number(above_zero=False)


def add_number(group: Any, name: str, default: float | None, text: str, kind: Callable[[str], float] = COUNT) -> None:
    """An option with a number, whose help tells its default."""
    metavar = "X" if kind in (POSITIVE, NON_NEGATIVE) else "N"
    shown = "" if default is None else f" (default: {default:g})"
    group.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text}{shown}")


def add_strength(method: Any, default: float) -> None:
    """That of the penalty; ``None`` if it is not given, so that methods without one can refuse it."""
    method.add_argument(
        "--strength",
        type=NON_NEGATIVE,
        metavar="X",
        help=f"of the penalty, for methods that have one (default: {default:g})",
    )


def add_head(model: Any, width: int) -> None:
    """What each head is made of.

    Args:
        model: group of an argument parser.
        width: default of the hidden layer.
    """
    add_head_width(model, width)
    model.add_argument(
        "--activation",
        choices=("gelu", "relu", "tanh", "silu"),
        default="gelu",
        help="in the heads; with relu, as in the paper, the penalty is blind to the backbone (default: gelu)",
    )


def add_head_width(model: Any, width: int) -> None:
    """The hidden layer of each head."""
    model.add_argument(
        "--head-width",
        type=whole_number(0),
        default=width,
        metavar="N",
        help=f"of the hidden layer in each head; 0 for linear heads (default: {width})",
    )


def add_method(method: Any) -> None:
    """Which method, and what it has to be told."""
    method.add_argument(
        "--method",
        choices=list(METHODS),
        default="srdml_entropic",
        metavar="METHOD",
        help=f"one of {', '.join(METHODS)} (default: srdml_entropic)",
    )
    add_strength(method, DEFAULT_STRENGTH)
    add_number(method, "--temperature", None, "of the entropic rule", POSITIVE)
    method.add_argument(
        "--pretraining-epochs",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="of hard sharing before the method sets in, as the authors do (default: 0)",
    )


def add_steps(
    steps: Any,
    *,
    epochs: int | None,
    batch_size: int,
    learning_rate: float | None,
    weight_decay: float | None = 0.05,
    samples: str = "images",
    layerwise: bool = True,
    warmup_steps: int = 0,
) -> None:
    """The steps of AdamW.

    Args:
        steps: group of an argument parser.
        epochs, batch_size, learning_rate, weight_decay, warmup_steps: defaults; ``None`` where a recipe has several.
        samples: what they are called.
        layerwise: with options for rates of their own for backbone and layers.
    """
    add_number(steps, "--epochs", epochs, "of the training; the best weights by validation are kept")
    add_number(steps, "--batch-size", batch_size, f"{samples} per step, of all processes together")
    add_number(steps, "--learning-rate", learning_rate, "of AdamW", POSITIVE)
    add_number(steps, "--weight-decay", weight_decay, "of matrices", NON_NEGATIVE)
    if layerwise:
        text = "learning rate of the backbone as a share of the heads'"
        add_number(steps, "--backbone-rate-factor", 1.0, text, POSITIVE)
        add_number(steps, "--layer-decay", None, "factor between the learning rates of neighbouring layers", POSITIVE)
    steps.add_argument("--decay", choices=DECAYS, default="cosine", help="of the learning rate (default: cosine)")
    steps.add_argument(
        "--warmup-steps", type=whole_number(0), default=warmup_steps, metavar="N", help=f"(default: {warmup_steps})"
    )
    add_number(steps, "--evaluations", 10, f"looks at the validation {samples}")
    steps.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of all draws (default: 0)")


def add_labelled(data: Any) -> None:
    """How many labels are known."""
    data.add_argument(
        "--labelled",
        type=POSITIVE,
        default=1.0,
        metavar="X",
        help="share of the training labels that is kept (default: 1)",
    )


def add_folder(run: Any, recipe: str) -> None:
    """Where the run is written."""
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


def check_method_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot go together."""
    check_training_arguments(parser, options)
    if METHODS[options.method].rule != "entropic" and options.temperature is not None:
        parser.error(f"argument --temperature: {options.method} does not have the entropic rule. Leave it out.")
    if METHODS[options.method].rule is None and options.strength is not None:
        parser.error(f"argument --strength: {options.method} has no penalty. Leave it out.")
    if options.method == BASELINE and options.pretraining_epochs:
        parser.error(
            "argument --pretraining-epochs: hard sharing is what would come before. Use more --epochs instead."
        )


def method_value(options: argparse.Namespace) -> float:
    """The value of what the method tunes."""
    if METHODS[options.method].rule is None:
        return float(options.weight_decay)
    return DEFAULT_STRENGTH if options.strength is None else float(options.strength)


def training_options(options: argparse.Namespace, *, channels_last: bool = False) -> Options:
    """What a training on the engine takes of the command line."""
    return Options(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        decay=options.decay,
        warmup_steps=options.warmup_steps,
        clip_norm=options.clip_norm,
        accumulation=options.accumulation,
        evaluations=options.evaluations,
        pretraining_epochs=options.pretraining_epochs,
        temperature=options.temperature,
        mixed_precision=options.mixed_precision,
        data_workers=options.data_workers,
        checkpoint_steps=options.checkpoint_steps,
        evaluation_batch_size=min(500, 4 * options.batch_size),
        log_steps=50,
        progress=True,
        trackers=tuple(options.trackers),
        channels_last=channels_last,
    )
