"""GoEmotions: 28 emotions as 28 heads on one encoder, trained by the Trainer of transformers or in a loop with accelerate.

By default a small BERT begins with random weights, which two cores can train; ``--encoder`` takes any of the hub's, or a
folder. Epochs, learning rate and weight decay are 8, 0.002 and 0.5 for the small one, and 3, 3e-5 and 0.01 for others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .data.texts.emotions import HUB_ID
from .models.text_encoders import SMALL
from .runs import shell
from .runs.command_line import (
    COUNT,
    Parser,
    add_choice,
    add_folder,
    add_head,
    add_labelled,
    add_method,
    add_number,
    add_options,
    check_method,
    check_options,
)
from .runs.emotion_run import LOOPS, EmotionRun

RECIPE = "go_emotions"
#: What a small encoder with new weights likes, and a pretrained one.
_STEPS_OF = {True: (8, 2e-3, 0.5), False: (3, 3e-5, 0.01)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one model and return the exit code."""
    packages = ("transformers", "datasets", "sklearn", "matplotlib", "accelerate", "tqdm")
    return shell.main(RECIPE, _parser(), _check, EmotionRun, packages, arguments)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name, value in zip(("epochs", "learning_rate", "weight_decay"), _STEPS_OF[options.encoder == SMALL]):
        if getattr(options, name) is None:
            setattr(options, name, value)
    check_options(parser, options)
    check_method(parser, options)
    # As torchrun and accelerate launch tell: no process has met the others yet.
    parts = options.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    if options.loop == "trainer" and options.batch_size % parts:
        parser.error(
            f"argument --batch-size: --loop trainer cannot split {options.batch_size} texts into {parts} equal parts."
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m recipes.{RECIPE}", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default=HUB_ID,
        metavar="DATA",
        help="folder of parquet files with the columns text and labels (lists of 0 to 27), or id on the hub (default: "
        f"{HUB_ID})",
    )
    for name in ("train", "validation"):
        data.add_argument(
            f"--{name}-texts",
            type=COUNT,
            metavar="N",
            help="drawn at random (default: all; without a test split 2,000 validation texts of the training split)",
        )
    add_labelled(data)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--encoder", default=SMALL, metavar="NAME", help=f"hub id or folder; {SMALL!r}: a new one (default: {SMALL})"
    )
    add_number(model, "--max-length", 32, "tokens that are kept of a text")
    add_number(model, "--width", 128, f"of the encoder {SMALL!r}")
    add_number(model, "--layers", 1, f"of the encoder {SMALL!r}")
    add_number(model, "--vocabulary", 4000, f"of the encoder {SMALL!r}, learned from the training texts")
    add_head(model, 32)
    groups = {name: parser.add_argument_group(name) for name in ("method", "steps", "run")}
    add_method(groups["method"])
    add_choice(
        groups["steps"],
        "--loop",
        LOOPS,
        "trainer",
        "the Trainer of transformers, which looks at the validation texts and saves after each epoch, or a loop with "
        "accelerate, which has all methods",
    )
    add_options(
        groups,
        samples="texts",
        epochs=None,
        batch_size=64,
        learning_rate=None,
        weight_decay=None,
        warmup_steps=100,
        checkpoint_steps=200,
    )
    add_folder(groups["run"], RECIPE)
    return parser


if __name__ == "__main__":
    sys.exit(main())
