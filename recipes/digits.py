"""Ten one-vs-rest tasks on real handwritten digits: single-task, hard sharing, gradient surgery and SRDML, compared fairly.

The 1,797 images (8x8) ship inside scikit-learn: nothing is downloaded. Started with ``torchrun`` or ``accelerate launch``,
all processes share each training.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saliency_reg.integrations.plot import draw_relations

from .data.digits import DIGIT_TASKS, TEST_IMAGES, digit_splits, most_per_class
from .methods.attach import PCGRAD
from .models.small_networks import ACTIVATIONS
from .runs.command_line import (
    Parser,
    add_training_arguments,
    check_training_arguments,
    folder_name,
    real_number,
    whole_number,
)
from .runtime.errors import RecipeError, need
from .runtime.processes import Ranks, started_ranks
from .runtime.run_folder import open_shared_folder
from .runtime.termination import listening
from .studies import digit_tables as tables
from .studies import pictures
from .studies.comparison import BASELINE, METHODS, Comparison
from .studies.digit_training import DTYPES, Schedule, train
from .studies.study_run import FIRST_TUNING_SEED, StudyRun

__all__ = ["main"]

RECIPE = "digits"
SCHEMA_VERSION = 3
#: What can be seen in a picture. The results have the conflicts of all methods with a shared backbone.
_CONFLICTS_OF = (BASELINE, "srdml_entropic", *PCGRAD, *(f"srdml_{key}" for key in PCGRAD))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and return the exit code."""
    # What is missing should be said before the work, not after.
    for module in ("sklearn", "tqdm", "matplotlib", "torchjd", "accelerate"):
        need(module)
    parser = _parser()
    options = parser.parse_args(arguments)
    _check_together(parser, options)
    with started_ranks() as state:
        try:
            return _run(parser, options, Ranks(state))
        except RecipeError as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, ranks: Ranks) -> int:
    _choose_workers(parser, options, ranks)
    with listening(), open_shared_folder(parser, options, ranks, (RECIPE, SCHEMA_VERSION)) as folder:
        if ranks.is_main:
            print(_introduction(options, ranks), flush=True)
        comparison = Comparison(
            [METHODS[key] for key in options.methods],
            {"weight decay": options.weight_decays, "strength": options.strengths},
            range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds),
            range(options.seeds),
            DIGIT_TASKS,
        )
        return _Run(folder, options, comparison, ranks).run()


def _choose_workers(parser: argparse.ArgumentParser, options: argparse.Namespace, ranks: Ranks) -> None:
    if ranks.size > 1 and options.workers not in (None, 1):
        parser.error(
            f"argument --workers: the {ranks.size} processes that were started share each training, and there are no other "
            "workers. Leave --workers out, or start the recipe with python -m recipes.digits."
        )
    if options.workers is None:
        options.workers = 1 if ranks.size > 1 else min(4, os.cpu_count() or 1)


class _Run(StudyRun):
    """The comparison behind the tables."""

    def __init__(self, folder: Path, options: argparse.Namespace, comparison: Comparison, ranks: Ranks) -> None:
        super().__init__(folder, options, RECIPE, SCHEMA_VERSION, ranks)
        self._processes = ranks.size
        self.comparison = comparison

    def train(self) -> None:
        """All trainings; results.json is brought up to date after each."""
        options = self.options
        schedule = Schedule(
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            activation=options.activation,
            temperature=options.temperature,
            dtype=options.dtype,
            accumulation=options.accumulation,
            mixed_precision=options.mixed_precision,
            data_workers=options.data_workers,
            clip_norm=options.clip_norm,
            checkpoint_steps=options.checkpoint_steps,
            trackers=tuple(options.trackers),
        )
        split = functools.partial(
            digit_splits,
            train_per_class=options.train_per_class,
            validation_per_class=options.validation_per_class,
            dtype=DTYPES[options.dtype],
        )
        resume = "never" if options.resume == "never" else "auto"
        work = functools.partial(train, split=split, schedule=schedule, folder=self.folder, resume=resume)
        self.follow(
            self.comparison.trainings,
            lambda workers: self.comparison.run(lambda jobs: workers.run_all(work, jobs)),
        )

    def content(self) -> dict[str, Any]:
        """What was tuned, trained and measured."""
        return {
            "tasks": list(DIGIT_TASKS),
            "test_images": TEST_IMAGES,
            "tuning_seeds": self.comparison.tuning_seeds,
            "seeds": self.comparison.seeds,
            "processes": self._processes,
            **self.comparison.to_dict(),
        }

    def show(self, content: dict[str, Any]) -> None:
        """Print the tables and draw the pictures of what there is."""
        methods = content["methods"]
        print("\nTuning, on validation only:")
        print(tables.tuning_table(methods))
        print(
            "\nTest, mean +- standard deviation over seeds (mean over the tasks; a task without positive predictions has "
            "precision 0):"
        )
        print(tables.result_table(methods))
        if content["difference_to_hard_sharing"]:
            print("\nDifference to hard sharing with the same seed, in percentage points:")
            print(tables.difference_table(methods, content["difference_to_hard_sharing"]))
        for key, relations in content["relations"].items():
            seeds = len(relations["seeds"])
            draw_relations(
                relations["mean"],
                relations["tasks"],
                self.folder / f"relations_{key}.png",
                title=f"Learned relations, {methods[key]['label']}, mean of {seeds} seed{'s' if seeds > 1 else ''}",
            )
        self._draw_curves(content["learning_curves"], {key: method["label"] for key, method in methods.items()})

    def _draw_curves(self, curves: dict[str, Any], labels: dict[str, str]) -> None:
        surgery = {key: curve for key, curve in curves.items() if METHODS[key].surgery is not None}
        others = {key: curve for key, curve in curves.items() if key not in surgery}
        baseline = {key: curve for key, curve in curves.items() if key == BASELINE}
        if others:
            pictures.draw_learning_curves(self.folder / "learning_curves.png", others, labels)
        if surgery:
            chosen = {**baseline, **surgery}
            pictures.draw_learning_curves(self.folder / "learning_curves_surgery.png", chosen, labels)
        conflicts = {key: curve for key, curve in curves.items() if key in _CONFLICTS_OF}
        if conflicts:
            pictures.draw_conflicts(self.folder / "conflicts.png", conflicts, labels)


def _introduction(options: argparse.Namespace, ranks: Ranks) -> str:
    trials = len(options.strengths)
    lines = [
        f"Digits: ten one-vs-rest tasks (10 % positive) with {options.train_per_class} training and "
        f"{options.validation_per_class} validation images per class,",
        f"drawn anew for each seed; the same {TEST_IMAGES} test images for all. With more training images all methods "
        "approach the ceiling.",
        f"All methods: AdamW, learning rate {options.learning_rate:g}, batch {options.batch_size}, {options.epochs} "
        f"epochs, the best one by validation AUC, {options.activation} heads.",
        f"Hyper-parameters: {trials} trial{'s' if trials > 1 else ''} per method, chosen by validation AUC on "
        f"{options.tuning_seeds} seed{'s' if options.tuning_seeds > 1 else ''} that "
        f"{'are' if options.tuning_seeds > 1 else 'is'} not among the {options.seeds} reported.",
        "Single-task is ten separate networks, ten times the parameters, with a best epoch each. SRDML has no weight "
        "decay.",
        "PCGrad (feature) and MGDA-UB weigh the task gradients at the feature map that the heads share, in the one backward",
        "pass. PCGrad (parameters) is the method of Yu et al. 2020 on all parameters of the backbone, with a backward pass",
        "for each task. Heads keep their plain gradients. MGDA-UB has the weights of the shortest convex combination of the",
        "gradients (Sener and Koltun 2018), or of the gradients at unit length (an option of their code). SRDML w/ PCGrad",
        "has the entropic rule; the gradient of the penalty is added, never projected.",
    ]
    if options.activation == "relu":
        lines.append("With ReLU heads the penalty does not reach the backbone: it trains the heads only.")
    if ranks.size > 1:
        lines.append(f"Each training is shared by {ranks.size} processes, the batch included.")
    if options.accumulation > 1:
        lines.append("Surgery at the feature map weighs each micro-batch on its own.")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m recipes.digits", description=__doc__)
    count, positive, non_negative = whole_number(1), real_number(above_zero=True), real_number(above_zero=False)

    def number(group: Any, name: str, default: float, text: str, kind: Callable[[str], float] = count) -> None:
        metavar = "N" if kind is count else "X"
        group.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text} (default: {default:g})")

    def several(group: Any, name: str, default: list[float], text: str) -> None:
        shown = " ".join(f"{value:g}" for value in default)
        text = f"{text} (default: {shown})"
        group.add_argument(name, type=non_negative, nargs="+", default=default, metavar="X", help=text)

    data = parser.add_argument_group("data")
    number(data, "--train-per-class", 5, "training images of each digit")
    number(data, "--validation-per-class", 20, "validation images of each digit")
    same = parser.add_argument_group("the same for all methods")
    number(same, "--epochs", 40, "epochs of each training; the best one by validation AUC is reported")
    number(same, "--batch-size", 10, "images per step, of all processes together")
    number(same, "--learning-rate", 5e-3, "of AdamW", positive)
    same.add_argument(
        "--activation",
        choices=list(ACTIVATIONS),
        default="gelu",
        help="in the heads; with relu, as in the paper, the penalty is blind to the backbone (default: gelu)",
    )
    fair = parser.add_argument_group("comparison")
    fair.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        metavar="METHOD",
        help=f"some of {', '.join(METHODS)} (default: all)",
    )
    number(fair, "--seeds", 5, "how many seeds are reported: 0, 1, ...")
    number(fair, "--tuning-seeds", 2, f"how many seeds tune the hyper-parameters: {FIRST_TUNING_SEED}, ...")
    several(fair, "--weight-decays", [0.0, 0.1, 1.0], "values tried for each method without a penalty")
    several(
        fair,
        "--strengths",
        [0.03, 0.1, 0.3],
        "values tried for each SRDML method, as many as weight decays; divided by the batch size for the authors' rule, "
        "whose penalty is a sum over the batch",
    )
    fair.add_argument(
        "--temperature", type=positive, metavar="X", help="of the entropic rule (default: that of saliency_reg)"
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--workers",
        type=count,
        metavar="N",
        help="trainings at a time, in processes of one thread each; the numbers do not depend on it "
        "(default: one for each core, at most 4)",
    )
    add_training_arguments(same, run)
    run.add_argument(
        "--out", type=Path, default=Path("runs/digits"), metavar="FOLDER", help="of all runs (default: runs/digits)"
    )
    run.add_argument("--name", type=folder_name, help="of this run's folder in it (default: date and time)")
    run.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|FOLDER",
        help="auto goes on with the run of this --name, if there is one: what is finished is not trained again, and what "
        "was stopped goes on from its latest checkpoint; FOLDER is that of the run (default: never)",
    )
    return parser


def _check_together(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    check_training_arguments(parser, options)
    most = most_per_class()
    wanted = options.train_per_class + options.validation_per_class
    if wanted > most:
        parser.error(
            f"--train-per-class and --validation-per-class ask for {wanted} images of each digit, but there are only "
            f"{most} outside the test set. Use --train-per-class {max(1, most - options.validation_per_class)} or less."
            if options.validation_per_class < most
            else f"argument --validation-per-class: there are only {most} images of each digit outside the test set. "
            "Use --validation-per-class 20."
        )
    if options.seeds > FIRST_TUNING_SEED:
        parser.error(
            f"argument --seeds: seeds from {FIRST_TUNING_SEED} on tune. Use --seeds {FIRST_TUNING_SEED} or less."
        )
    for name in ("methods", "weight_decays", "strengths"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            option = "--" + name.replace("_", "-")
            parser.error(f"argument {option}: the same value twice. Use each value once.")
    if len(options.strengths) != len(options.weight_decays):
        parser.error(
            f"every method gets the same number of trials, but there are {len(options.weight_decays)} --weight-decays "
            f"and {len(options.strengths)} --strengths. Use as many of the one as of the other."
        )


if __name__ == "__main__":
    sys.exit(main())
