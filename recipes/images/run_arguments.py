"""The options of a single training on images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import add_training_arguments, check_training_arguments, folder_name, real_number, whole_number
from ..learning_rate import DECAYS
from ..multi_task.methods import BASELINE, METHODS
from ..multi_task.training import Options

__all__ = ["add_run_arguments", "check_run_arguments", "method_value", "training_options"]

DEFAULT_STRENGTH = 0.03
_COUNT, _POSITIVE, _NON_NEGATIVE = whole_number(1), real_number(above_zero=True), real_number(above_zero=False)


def _number(group: Any, name: str, default: float | None, text: str, kind: Callable[[str], float] = _COUNT) -> None:
    metavar = "X" if kind in (_POSITIVE, _NON_NEGATIVE) else "N"
    shown = "" if default is None else f" (default: {default:g})"
    group.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text}{shown}")


def add_run_arguments(
    parser: argparse.ArgumentParser,
    recipe: str,
    *,
    backbone: str,
    image_size: int | None,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Add everything but the data: model, method, steps, and the run's folder.

    Args:
        parser: of the recipe.
        recipe: its name, for the default folder.
        backbone, image_size, epochs, batch_size, learning_rate: defaults.
    """
    _add_model(parser.add_argument_group("model"), backbone, image_size)
    _add_method(parser.add_argument_group("method"))
    steps = parser.add_argument_group("steps")
    _add_steps(steps, epochs, batch_size, learning_rate)
    run = parser.add_argument_group("run")
    add_training_arguments(steps, run, formats=False, checkpoint_steps=200)
    _add_folder(run, recipe)


def _add_model(model: Any, backbone: str, image_size: int | None) -> None:
    model.add_argument("--backbone", default=backbone, metavar="NAME", help=f"any of timm's (default: {backbone})")
    model.add_argument("--pretrained", action="store_true", help="begin with timm's weights, which are downloaded")
    model.add_argument("--checkpoint-path", metavar="FILE", help="begin with the backbone weights of a file")
    size = "the backbone's own" if image_size is None else image_size
    model.add_argument(
        "--image-size", type=_COUNT, default=image_size, metavar="N", help=f"height and width (default: {size})"
    )
    model.add_argument(
        "--head-width",
        type=whole_number(0),
        default=128,
        metavar="N",
        help="of the hidden layer in each head; 0 for linear heads (default: 128)",
    )
    model.add_argument(
        "--activation",
        choices=("gelu", "relu", "tanh", "silu"),
        default="gelu",
        help="in the heads; with relu, as in the paper, the penalty is blind to the backbone (default: gelu)",
    )
    _number(model, "--drop-rate", 0.0, "dropout in the heads", _NON_NEGATIVE)
    _number(model, "--drop-path-rate", None, "stochastic depth of the backbone", _NON_NEGATIVE)


def _add_method(method: Any) -> None:
    method.add_argument(
        "--method",
        choices=list(METHODS),
        default="srdml_entropic",
        metavar="METHOD",
        help=f"one of {', '.join(METHODS)} (default: srdml_entropic)",
    )
    method.add_argument(
        "--strength",
        type=_NON_NEGATIVE,
        metavar="X",
        help=f"of the penalty, for methods that have one (default: {DEFAULT_STRENGTH:g})",
    )
    _number(method, "--temperature", None, "of the entropic rule", _POSITIVE)
    method.add_argument(
        "--pretraining-epochs",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="of hard sharing before the method sets in, as the authors do (default: 0)",
    )


def _add_steps(steps: Any, epochs: int, batch_size: int, learning_rate: float) -> None:
    _number(steps, "--epochs", epochs, "of the training; the best weights by validation are kept")
    _number(steps, "--batch-size", batch_size, "images per step, of all processes together")
    _number(steps, "--learning-rate", learning_rate, "of AdamW", _POSITIVE)
    _number(steps, "--weight-decay", 0.05, "of matrices", _NON_NEGATIVE)
    _number(steps, "--backbone-rate-factor", 1.0, "learning rate of the backbone as a share of the heads'", _POSITIVE)
    _number(steps, "--layer-decay", None, "factor between the learning rates of neighbouring layers", _POSITIVE)
    steps.add_argument("--decay", choices=DECAYS, default="cosine", help="of the learning rate (default: cosine)")
    steps.add_argument("--warmup-steps", type=whole_number(0), default=0, metavar="N", help="(default: 0)")
    _number(steps, "--evaluations", 10, "looks at the validation images")
    steps.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of all draws (default: 0)")


def _add_folder(run: Any, recipe: str) -> None:
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


def check_run_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot go together."""
    check_training_arguments(parser, options)
    if options.pretrained and options.checkpoint_path is not None:
        parser.error("--pretrained and --checkpoint-path both name weights. Leave one of them out.")
    if METHODS[options.method].rule != "entropic" and options.temperature is not None:
        parser.error(f"argument --temperature: {options.method} does not have the entropic rule. Leave it out.")
    if METHODS[options.method].rule is None and options.strength is not None:
        parser.error(f"argument --strength: {options.method} has no penalty. Leave it out.")
    if options.method == BASELINE and options.pretraining_epochs:
        parser.error(
            "argument --pretraining-epochs: hard sharing is what would come before. Type more --epochs instead."
        )


def training_options(options: argparse.Namespace) -> Options:
    """What the training takes of the command line."""
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
        channels_last=True,
    )


def method_value(options: argparse.Namespace) -> float:
    """The value of what the method tunes."""
    if METHODS[options.method].rule is None:
        return float(options.weight_decay)
    return DEFAULT_STRENGTH if options.strength is None else float(options.strength)
