"""Twelve related linear tasks with few samples: single-task, mean-regularised, pooled and SRDML, compared fairly.

The synthetic experiment of the paper: task t has the weights a_t * ones(20), a = 1 1 2 2 3 3 -1 -1 -2 -2 -3 -3. Behind a
linear layer that all tasks share, hard sharing, gradient surgery and SRDML are compared, too.
"""

from __future__ import annotations

import argparse
import sys

from .runs.command_line import NON_NEGATIVE, POSITIVE, add_choice, add_number
from .studies.command import StudyCommand
from .studies.linear_tasks.closed_forms import CLOSED_FORM_STRENGTHS
from .studies.linear_tasks.fits import train_linear
from .studies.linear_tasks.methods import METHODS, MOST_TRIALS, SINGLE_TASK, grids
from .studies.linear_tasks.problem import BASES, FEATURES, TASKS, Problem
from .studies.linear_tasks.report import METRICS, report
from .studies.study import Setting

_IN_CELLS = ("train", "validation", "test", "noise", "shared_inputs", "weights", "steps", "patience", "learning_rate")
_ABOUT_SURGERY = """\
PCGrad (parameters), the method of Yu et al. 2020, acts on the weights of that layer; PCGrad (feature) and MGDA-UB
act at its output. There the loss of each task depends on samples of its own: task gradients never conflict, so
that PCGrad (feature) is hard sharing to the last digit, and SRDML w/ PCGrad (feature) is SRDML. MGDA-UB still
gives most weight to the smallest gradient. SRDML with the shared layer: l1, entropic."""


def _settings(options: argparse.Namespace) -> dict[str, Setting]:
    values = {"version": 1, "data": "synthetic", **{name: getattr(options, name) for name in _IN_CELLS}}
    inputs = "one set of inputs for all tasks" if options.shared_inputs else "own inputs"
    label = f"Synthetic, {inputs}, weights a_t * {options.weights}"
    published = tuple(key for key, method in METHODS.items() if method.tuned)
    return {"synthetic": Setting("synthetic", label, values, published, grids(options.trials))}


def _introduction(options: argparse.Namespace) -> str:
    shared = "the same for all tasks" if options.shared_inputs else "each task its own"
    base = "ones" if options.weights == "ones" else "a normal vector of each seed"
    lines = [
        f"Synthetic: {len(TASKS)} linear tasks with {FEATURES} features, weights a_t * {base}; {options.train} training "
        f"samples ({shared}),",
        f"{options.validation} validation and {options.test} test samples per task. No method has an intercept.",
        f"Trained methods: full-batch Adam, at most {options.steps} steps, the best one by validation RMSE; learning rate "
        f"{options.learning_rate:g}, tuned for single-task.",
        f"Hyper-parameters: at most {options.trials} trials per trained method, chosen by validation RMSE on "
        f"{options.tuning_seeds} tuning seeds, none of them among the {options.seeds} reported.",
        f"Closed forms (ridge, RMTL, pooled): the best of {len(CLOSED_FORM_STRENGTHS)} strengths on the validation split "
        "of each reported seed; ridge for each task.",
        "Single-task with early stopping has a best step for each task; methods that share anything have one for all.",
        "Errors in and outside of the span of a task's training inputs are those of its weights (norm).",
    ]
    tried = grids(options.trials)
    if trials := [len(tried[key]) for key in options.methods or METHODS if METHODS[key].shared]:
        lines.append(
            f"Shared layer: a linear map of the {FEATURES} features, which all tasks share, comes before a column for "
            f"each; {trials[0]} trial{'s' if trials[0] > 1 else ''} each.\n{_ABOUT_SURGERY}"
        )
    return "\n".join(lines)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    add_number(data, "--train", Problem.train, "training samples of each task")
    add_number(data, "--validation", Problem.validation, "validation samples of each task")
    add_number(data, "--test", Problem.test, "test samples of each task")
    add_number(data, "--noise", Problem.noise, "standard deviation of the noise in the targets", NON_NEGATIVE)
    text = "one set of training inputs for all tasks, as in the authors' script"
    data.add_argument("--shared-inputs", action="store_true", help=text)
    text = "what the factors a_t multiply: ones, as in the paper, which Adam favours by itself, or a normal vector of a seed"
    add_choice(data, "--weights", BASES, "ones", text)
    same = parser.add_argument_group("the same for all trained methods")
    add_number(same, "--steps", 1000, "most steps of a training")
    add_number(same, "--patience", 250, "steps without a lower validation RMSE after which a training ends")
    add_number(same, "--learning-rate", 0.1, "of Adam, except where it is tuned", POSITIVE)
    add_number(same, "--trials", MOST_TRIALS, "most values tried for each trained method, spread over its grid")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.methods and not set(SINGLE_TASK) & set(options.methods):
        parser.error(
            f"argument --methods: the ratio needs a single-task method. Add {' or '.join(SINGLE_TASK)} to --methods."
        )


COMMAND = StudyCommand(
    name="synthetic",
    description=__doc__,
    settings=_settings,
    metrics=METRICS,
    compared=(),
    train=train_linear,
    packages=("matplotlib", "pandas", "torchjd"),
    add_arguments=_add_arguments,
    check=_check,
    introduction=_introduction,
    draw=report,
    methods=METHODS,
    searches=False,
    seeds=10,
    architectures=("hard_sharing", "single_task"),
    workers=4,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
