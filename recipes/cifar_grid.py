"""Tables on CIFAR-10: methods tuned alike on validation, over seeds, training sizes, heads, and shares of missing labels.

Every result goes into one file as soon as it is there, and is never computed again: stop the command whenever you like, and
type it again to go on. The tables say what is not done yet.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .arguments import OneVoiceParser, real_number, whole_number
from .errors import RecipeError
from .extras import need
from .images.cifar import HUB_ID, fingerprint
from .images.cifar_training import CifarCell
from .images.small_backbone import SMALL_BACKBONE
from .multi_task.cells import CellFile
from .multi_task.study import FIRST_TUNING_SEED, Setting, Study
from .multi_task.study_tables import markdown
from .runs import locked
from .study_run import INTERRUPTED
from .termination import TERMINATED, Terminated, listening
from .workers import Workers

__all__ = ["SETTINGS", "main"]

#: Raise it when the trainings behind the same values change: old results are then no longer found.
VERSION = 1
_METRICS = ("accuracy", "auc", "precision", "recall")
_FULL = ("hard_sharing", "uniform", "srdml_projected", "srdml_entropic", "pcgrad", "srdml_pcgrad")
_MISSING = (*_FULL[:4], "srdml_cosine", "srdml_sqchordal", *_FULL[4:])
#: As many values for each: hard sharing is tuned as hard as the others.
_GRIDS: dict[str, tuple[float, ...]] = {
    "weight decay": (0.0, 0.05, 0.5),
    "strength, l1": (0.01, 0.03, 0.1),
    "strength, cosine": (0.03, 0.1, 0.3),
    "strength, sqchordal": (0.03, 0.1, 0.3),
}


def _setting(train_images: int, activation: str, labelled: float = 1.0, tasks: str = "classes") -> Setting:
    key = f"{tasks}-{train_images}-{activation}"
    label = f"{train_images:,} training images, {activation.upper() if activation == 'gelu' else 'ReLU'} heads"
    if labelled < 1:
        removed = round(100 * (1 - labelled))
        key, label = f"{key}-{removed}-removed", f"{label}, {removed} % of the labels removed"
    if tasks == "attributes":
        label = f"15 attributes, {label}"
    values = {
        "version": VERSION,
        "data": "cifar10",
        "tasks": tasks,
        "train_images": train_images,
        "validation_images": 1000,
        "labelled": labelled,
        "image_size": 32,
        "backbone": SMALL_BACKBONE,
        "activation": activation,
        "head_width": 32,
        "epochs": 40 if train_images <= 500 else 15,
        "batch_size": 50,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "evaluations": 10,
        "temperature": None,
    }
    return Setting(key, label, values, _FULL if labelled == 1 else _MISSING, _GRIDS)


#: In the order in which they are trained.
SETTINGS = {
    setting.key: setting
    for setting in (
        _setting(500, "gelu"),
        _setting(2000, "gelu", 0.1),
        _setting(500, "relu"),
        _setting(2000, "gelu", 0.1, "attributes"),
        _setting(2000, "gelu"),
        _setting(2000, "gelu", 0.5),
        _setting(2000, "relu"),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, print the tables, and return the exit code."""
    for module in ("sklearn", "tqdm", "accelerate", "timm", "datasets"):
        need(module)
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _run(parser, options)
    except RecipeError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    path: Path = options.results
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(path.parent))
        except BlockingIOError:
            parser.error(f"argument --results: another run is at work in {path.parent}. Stop it, or type another file.")
        settings = [SETTINGS[key] for key in options.settings]
        seeds = range(options.seeds)
        tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
        cells = CellFile(path)
        study = Study(settings, seeds, tuning_seeds, cells)
        code = 0
        if options.minutes is None or options.minutes > 0:
            if cells.about.get("data", found := fingerprint(options.data)) != found:
                parser.error(
                    f"argument --data: the results in {path} are of other images than those of {options.data}. Type another "
                    "--results."
                )
            code = _train(study, options)
        print(markdown(study, _METRICS, ("accuracy", "auc")))
        print(f"\n{study.done} of {study.trainings} trainings are done. Results: {path}")
        return code


def _train(study: Study, options: argparse.Namespace) -> int:
    deadline = None if options.minutes is None else time.time() + 60 * options.minutes
    train = CifarCell(options.data, deadline)
    bar = need("tqdm").tqdm(total=study.trainings, initial=study.done, unit="training", disable=None)
    try:
        with listening(), bar, Workers(options.workers) as workers:
            for cell in study.run(workers.run_all, train):
                bar.set_postfix_str(f"{cell.setting.key}, {cell.method.key}, seed {cell.seed}")
                bar.update()
    except KeyboardInterrupt:
        print("\nInterrupted. What follows is from the trainings that were finished.")
        return INTERRUPTED
    except Terminated:
        print("\nTerminated. Type the same command again to go on.")
        return TERMINATED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneVoiceParser(prog="python -m recipes.cifar_grid", description=__doc__)
    parser.add_argument(
        "--data", default=HUB_ID, help=f"folder of parquet files, or id on the hub (default: {HUB_ID})", metavar="DATA"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=list(SETTINGS),
        default=list(SETTINGS),
        metavar="SETTING",
        help=f"some of {', '.join(SETTINGS)} (default: all, in this order)",
    )
    parser.add_argument(
        "--seeds", type=whole_number(1), default=5, metavar="N", help="reported: 0, 1, ... (default: 5)"
    )
    parser.add_argument(
        "--tuning-seeds",
        type=whole_number(1),
        default=2,
        metavar="N",
        help=f"of each trial: {FIRST_TUNING_SEED}, ... (default: 2)",
    )
    parser.add_argument(
        "--minutes",
        type=real_number(above_zero=False),
        metavar="X",
        help="after which no training begins; 0 only prints the tables (default: no limit)",
    )
    parser.add_argument(
        "--workers", type=whole_number(1), default=2, metavar="N", help="trainings at a time (default: 2)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("runs/cifar_grid/results.jsonl"),
        metavar="FILE",
        help="what is there is not computed again (default: runs/cifar_grid/results.jsonl)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
