"""Ten one-vs-rest tasks on real handwritten digits: single-task, hard sharing, gradient surgery and SRDML, compared fairly.

The 1,797 images (8x8) ship inside scikit-learn: nothing is downloaded. Started with ``torchrun`` or ``accelerate launch``,
all processes share each training. Every result goes into one file as soon as it is there, and is never computed again.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .data.digits import TEST_IMAGES, most_per_class
from .runs.command_line import (
    NON_NEGATIVE,
    add_choice,
    add_number,
    add_options,
    check_options,
)
from .studies.command import StudyCommand
from .studies.digit_cells import DTYPES, train_digits
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


def _introduction(options: argparse.Namespace) -> str:
    lines = [
        f"Digits: ten one-vs-rest tasks (10 % positive) with {options.train_per_class} training and "
        f"{options.validation_per_class} validation images per class,",
        f"drawn anew for each seed; the same {TEST_IMAGES} test images for all. With more training images all methods "
        "approach the ceiling.",
        f"All methods: AdamW, learning rate {options.learning_rate:g}, batch {options.batch_size}, {options.epochs} "
        f"epochs, the best one by validation AUC, {options.activation} heads.",
        f"Values tried for the hyper-parameter of each method: {options.trials or len(options.strengths)}, chosen by "
        f"validation AUC on seeds ({options.tuning_seeds}) that are not among the {options.seeds} reported.",
        "Single-task is ten separate networks, ten times the parameters, with a best epoch each. SRDML has no weight "
        "decay.",
        "PCGrad (feature) and MGDA-UB weigh the task gradients at the feature map that the heads share, in the one backward",
        "pass. PCGrad (parameters) is the method of Yu et al. 2020 on all parameters of the backbone, with a backward pass",
        "for each task. Heads keep their plain gradients. MGDA-UB has the weights of the shortest convex combination of the",
        "gradients (Sener and Koltun 2018), or of the gradients at unit length (an option of their code). SRDML has the",
        "entropic rule if no other is named; with PCGrad, the gradient of the penalty is added, never projected.",
    ]
    if options.activation == "relu":
        lines.append("With ReLU heads the penalty does not reach the backbone: it trains the heads only.")
    if options.accumulation > 1:
        lines.append("Surgery at the feature map weighs each micro-batch on its own.")
    return "\n".join(lines)


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


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    check_options(parser, options)
    most, validation = most_per_class(), options.validation_per_class
    if validation >= most:
        parser.error(
            f"argument --validation-per-class: there are only {most} images of each digit outside the test set. Use "
            "--validation-per-class 20."
        )
    if options.train_per_class + validation > most:
        parser.error(
            f"--train-per-class and --validation-per-class ask for {options.train_per_class + validation} images of each "
            f"digit, but there are only {most} outside the test set. Use --train-per-class {most - validation} or less."
        )
    for name in ("weight_decays", "strengths"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            parser.error(f"argument --{name.replace('_', '-')}: the same value twice. Use each value once.")
    if options.trials is not None and len(options.strengths) == 1:
        parser.error(
            "argument --trials: there is nothing to search with a single value. Use several --strengths, or leave it out."
        )
    if len(options.strengths) != len(options.weight_decays):
        parser.error(
            f"every method gets the same number of trials, but there are {len(options.weight_decays)} --weight-decays "
            f"and {len(options.strengths)} --strengths. Use as many of the one as of the other."
        )


def _of_the_run(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _OF_THE_RUN} | {"trackers": tuple(options.trackers)}


COMMAND = StudyCommand(
    name="digits",
    description=__doc__,
    settings=_settings,
    metrics=("accuracy", "auc", "precision", "recall"),
    compared=("accuracy", "auc"),
    train=train_digits,
    place=_of_the_run,
    packages=("matplotlib", "torchjd"),
    add_arguments=_add_arguments,
    check=_check,
    introduction=_introduction,
    draw=draw_study,
    workers=4,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
