"""The options of a single training on images."""

from __future__ import annotations

import argparse
from typing import Any

from .command_line import (
    COUNT,
    NON_NEGATIVE,
    POSITIVE,
    add_folder,
    add_head,
    add_method,
    add_number,
    add_options,
    check_method,
    check_options,
)


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
    groups = {name: parser.add_argument_group(name) for name in ("model", "method", "steps", "run")}
    _add_model(groups["model"], backbone, image_size)
    add_method(groups["method"])
    add_options(
        groups,
        samples="images",
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        checkpoint_steps=200,
    )
    text = "learning rate of the backbone as a share of the heads'"
    add_number(groups["steps"], "--backbone-rate-factor", 1.0, text, POSITIVE)
    text = "factor between the learning rates of neighbouring layers"
    add_number(groups["steps"], "--layer-decay", None, text, POSITIVE)
    add_folder(groups["run"], recipe)


def _add_model(model: Any, backbone: str, image_size: int | None) -> None:
    model.add_argument("--backbone", default=backbone, metavar="NAME", help=f"any of timm's (default: {backbone})")
    model.add_argument("--pretrained", action="store_true", help="begin with timm's weights, which are downloaded")
    model.add_argument("--checkpoint-path", metavar="FILE", help="begin with the backbone weights of a file")
    size = "the backbone's own" if image_size is None else image_size
    model.add_argument(
        "--image-size", type=COUNT, default=image_size, metavar="N", help=f"height and width (default: {size})"
    )
    add_head(model, 128)
    add_number(model, "--drop-rate", 0.0, "dropout in the heads", NON_NEGATIVE)
    add_number(model, "--drop-path-rate", None, "stochastic depth of the backbone", NON_NEGATIVE)


def check_run_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot go together."""
    if options.pretrained and options.checkpoint_path is not None:
        parser.error("--pretrained and --checkpoint-path both name weights. Leave one of them out.")
    check_options(parser, options)
    check_method(parser, options)
