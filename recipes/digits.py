"""Ten one-vs-rest tasks on real handwritten digits: single-task, hard sharing, gradient surgery and SRDML, compared fairly.

The 1,797 images (8x8) ship inside scikit-learn: nothing is downloaded. Started with ``torchrun`` or ``accelerate launch``,
all processes share each training. Every result goes into one file as soon as it is there, and is never computed again.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .runs.command_line import (
    NON_NEGATIVE,
    add_choice,
    add_number,
    add_options,
)
from .studies.command import StudyCommand
from .studies.digit_cells import DTYPES, check_digits, introduction, train_digits
from .studies.pictures import draw_study
from .studies.study import Setting

#: Those of the published table; ``--methods`` takes any.
METHODS = (
    *("single_task", "hard_sharing", "pcgrad", "pcgrad@parameters", "mgda_ub", "mgda_ub_unit"),
    *("srdml_projected", "srdml", "srdml_authors", "srdml+pcgrad", "srdml+pcgrad@parameters"),
)
#: Options that change no number.
_OF_THE_RUN = ("checkpoint_steps", "data_workers", "trackers")
_IN_CELLS = (
    *("train_per_class", "validation_per_class", "epochs", "batch_size", "learning_rate", "activation", "temperature"),
    *("dtype", "accumulation", "mixed_precision", "clip_norm"),
)


def _settings(options: argparse.Namespace) -> dict[str, Setting]:
    values = {name: getattr(options, name) for name in _IN_CELLS}
    # SRDML has no weight decay: methods without a penalty tune it.
    values = {"version": 1, "data": "digits", **values, "decay": "constant", "weight_decay": 0.0}
    values["evaluations"] = values["epochs"]
    label = f"Digits, {options.train_per_class} training images of each class"
    spaces = {"weight decay": tuple(options.weight_decays), "strength": tuple(options.strengths)}
    return {"digits": Setting("digits", label, values, METHODS, spaces)}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    add_number(data, "--train-per-class", 5, "training images of each digit")
    add_number(data, "--validation-per-class", 20, "validation images of each digit")
    steps, run = parser.add_argument_group("the same for all methods"), parser.add_argument_group("each training")
    left_out = ("weight_decay", "decay", "warmup_steps", "evaluations", "seed", "pretraining_epochs")
    groups = {"steps": steps, "method": steps, "run": run}
    add_options(groups, samples="images", leave_out=left_out, epochs=40, batch_size=10, learning_rate=5e-3)
    text = "in the heads; with relu, as in the paper, the penalty is blind to the backbone"
    add_choice(steps, "--activation", ("gelu", "relu"), "gelu", text)
    add_choice(steps, "--dtype", list(DTYPES), "float32", "of weights and data")
    for name, default, text in (
        ("--weight-decays", [0.0, 0.1, 1.0], "values tried for each method without a penalty"),
        ("--strengths", [0.03, 0.1, 0.3], "values tried for each SRDML method, as many as weight decays; divided by the "
         "batch size for the authors' rule, whose penalty is a sum over the batch"),
    ):  # fmt: skip
        shown = f"{text} (default: {' '.join(map(str, default))})"
        steps.add_argument(name, type=NON_NEGATIVE, nargs="+", default=default, metavar="X", help=shown)


def _of_the_run(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _OF_THE_RUN} | {"trackers": tuple(options.trackers)}


COMMAND = StudyCommand(
    name="digits",
    description=__doc__,
    settings=_settings,
    metrics=("accuracy", "auc", "precision", "recall"),
    compared=("accuracy", "auc"),
    judged=("auc",),
    train=train_digits,
    place=_of_the_run,
    packages=("matplotlib", "torchjd"),
    add_arguments=_add_arguments,
    check=check_digits,
    introduction=introduction,
    draw=draw_study,
    architectures=("hard_sharing", "single_task"),
    workers=4,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
