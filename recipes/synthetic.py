"""Twelve related linear tasks with few samples: single-task, mean-regularised, pooled and SRDML, compared fairly.

The synthetic experiment of the paper: task t has the weights a_t * ones(20), a = 1 1 2 2 3 3 -1 -1 -2 -2 -3 -3. Behind a
linear layer that all tasks share, hard sharing, gradient surgery and SRDML are compared, too.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .runs.command_line import folder_name, real_number, whole_number
from .runtime.errors import need
from .runtime.run_folder import open_folder
from .studies.linear_tasks import report as report
from .studies.linear_tasks.closed_forms import CLOSED_FORM_STRENGTHS
from .studies.linear_tasks.fits import Schedule, fit
from .studies.linear_tasks.methods import METHODS, SINGLE_TASK
from .studies.linear_tasks.problem import BASES, FACTORS, FEATURES, TASKS, Problem
from .studies.linear_tasks.study import Study
from .studies.study_run import FIRST_TUNING_SEED, StudyRun

__all__ = ["main"]

SCHEMA_VERSION = 2
MOST_TRIALS = max(len(method.settings) for method in METHODS.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    for module in ("tqdm", "matplotlib", "torchjd"):  # what is missing should be said before the work, not after
        need(module)
    parser = _parser()
    options = parser.parse_args(arguments)
    _check_together(parser, options)
    folder = open_folder(parser, options)
    print(_introduction(options), flush=True)
    study = Study(
        [METHODS[key] for key in options.methods],
        options.trials,
        range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds),
        range(options.seeds),
    )
    return _Run(folder, options, study).run()


class _Run(StudyRun):
    """The study behind the tables."""

    def __init__(self, folder: Path, options: argparse.Namespace, study: Study) -> None:
        super().__init__(folder, options, "synthetic", SCHEMA_VERSION)
        self.study = study

    def train(self) -> None:
        """All trainings; results.json is brought up to date every second."""
        options = self.options
        problem = Problem(
            options.train, options.validation, options.test, options.noise, options.shared_inputs, options.weights
        )
        schedule = Schedule(options.steps, options.patience, options.learning_rate)
        work = functools.partial(fit, problem=problem, schedule=schedule)
        self.follow(self.study.trainings, lambda workers: self.study.run(lambda jobs: workers.run_all(work, jobs)))

    def content(self) -> dict[str, Any]:
        """What was tuned, trained and measured."""
        return {
            "tasks": list(TASKS),
            "factors": list(FACTORS),
            "tuning_seeds": self.study.tuning_seeds,
            "seeds": self.study.seeds,
            **self.study.to_dict(),
        }

    def show(self, content: dict[str, Any]) -> None:
        """Print the tables and draw the pictures of what there is."""
        methods = content["methods"]
        print("\nTuning, on validation only:")
        print(report.tuning_table(methods))
        baseline = content["best_single_task"]
        against = "" if baseline is None else f"; ratio to: {methods[baseline]['label']}"
        print(f"\nTest, mean +- standard deviation over seeds of the mean RMSE of the tasks{against}:")
        print(report.result_table(methods))
        if content["difference_to_shared_hard_sharing"]:
            print(
                "\nShared layer: test RMSE minus that of hard sharing, and in how many seeds it is lower, equal or higher:"
            )
            print(report.difference_table(methods, content["difference_to_shared_hard_sharing"]))
        if content["relations"]:
            print("\nRelations, in their mean over the seeds and seed by seed:")
            print(report.quality_table(methods, content["relations"]))
        report.draw_panels(self.folder / "panels.png", content)


def _introduction(options: argparse.Namespace) -> str:
    shared = "the same for all tasks" if options.shared_inputs else "each task its own"
    base = "ones" if options.weights == "ones" else "a normal vector of each seed"
    return "\n".join(
        [
            f"Synthetic: {len(TASKS)} linear tasks with {FEATURES} features, weights a_t * {base}; {options.train} "
            f"training samples ({shared}),",
            f"{options.validation} validation and {options.test} test samples per task. No method has an intercept.",
            f"Trained methods: full-batch Adam, at most {options.steps} steps, the best one by validation RMSE; learning "
            f"rate {options.learning_rate:g}, tuned for single-task.",
            f"Hyper-parameters: at most {options.trials} trials per trained method, chosen by validation RMSE on "
            f"{options.tuning_seeds} tuning seeds, none of them among the {options.seeds} reported.",
            f"Closed forms (ridge, RMTL, pooled): the best of {len(CLOSED_FORM_STRENGTHS)} strengths on the validation "
            "split of each reported seed; ridge for each task.",
            "Single-task with early stopping has a best step for each task; methods that share anything have one for all.",
            "Errors in and outside of the span of a task's training inputs are those of its weights (norm).",
            *_about_shared_layer(options),
        ]
    )


def _about_shared_layer(options: argparse.Namespace) -> list[str]:
    shared = [METHODS[key] for key in options.methods if METHODS[key].shared_layer]
    if not shared:
        return []
    trials = min(options.trials, max(len(method.settings) for method in shared))
    return [
        f"Shared layer: a linear map of the {FEATURES} features, which all tasks share, comes before a column for each; "
        f"{trials} trial{'s' if trials > 1 else ''} each.",
        "PCGrad (parameters), the method of Yu et al. 2020, acts on the weights of that layer; PCGrad (feature) and MGDA-UB",
        "act at its output. There the loss of each task depends on samples of its own: task gradients never conflict, so",
        "that PCGrad (feature) is hard sharing to the last digit, and SRDML w/ PCGrad (feature) is SRDML. MGDA-UB still",
        "gives most weight to the smallest gradient. SRDML with the shared layer: l1, entropic.",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.synthetic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, positive, non_negative = whole_number(1), real_number(above_zero=True), real_number(above_zero=False)

    def number(group: Any, name: str, default: float, text: str, kind: Callable[[str], float] = count) -> None:
        metavar = "N" if kind is count else "X"
        group.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default:g})")

    data = parser.add_argument_group("data")
    number(data, "--train", Problem.train, "training samples of each task")
    number(data, "--validation", Problem.validation, "validation samples of each task")
    number(data, "--test", Problem.test, "test samples of each task")
    number(data, "--noise", Problem.noise, "standard deviation of the noise in the targets", non_negative)
    data.add_argument(
        "--shared-inputs",
        action="store_true",
        help="one set of training inputs for all tasks, as in the authors' script",
    )
    data.add_argument(
        "--weights",
        choices=BASES,
        default="ones",
        help="what the factors a_t multiply: ones, as in the paper, which Adam favours by itself, or a normal vector drawn "
        "anew for each seed (default: ones)",
    )
    same = parser.add_argument_group("the same for all trained methods")
    number(same, "--steps", Schedule.steps, "most steps of a training")
    number(same, "--patience", Schedule.patience, "steps without a lower validation RMSE after which a training ends")
    number(same, "--learning-rate", Schedule.learning_rate, "of Adam, except where it is tuned", positive)
    fair = parser.add_argument_group("comparison")
    fair.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)} (default: all)",
    )
    number(fair, "--seeds", 10, "how many seeds are reported: 0, 1, ...")
    number(fair, "--tuning-seeds", 2, f"how many seeds tune the hyper-parameters: {FIRST_TUNING_SEED}, ...")
    number(fair, "--trials", MOST_TRIALS, "most settings tried for each trained method, spread over its grid")
    run = parser.add_argument_group("run")
    number(
        run, "--workers", min(4, os.cpu_count() or 1), "processes of one thread each; the numbers do not depend on it"
    )
    run.add_argument(
        "--out",
        type=Path,
        default=Path("runs/synthetic"),
        metavar="FOLDER",
        help="of all runs (default: runs/synthetic)",
    )
    run.add_argument("--name", type=folder_name, help="of this run's folder in it (default: date and time)")
    return parser


def _check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.seeds > FIRST_TUNING_SEED:
        parser.error(
            f"argument --seeds: seeds from {FIRST_TUNING_SEED} on tune. Use --seeds {FIRST_TUNING_SEED} or less."
        )
    if len(set(options.methods)) < len(options.methods):
        parser.error("argument --methods: the same method twice. Use each method once.")
    if not set(SINGLE_TASK) & set(options.methods):
        parser.error(
            f"argument --methods: the ratio needs a single-task method. Add {' or '.join(SINGLE_TASK)} to --methods."
        )


if __name__ == "__main__":
    sys.exit(main())
