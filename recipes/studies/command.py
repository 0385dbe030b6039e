"""The command line of a study: it trains what is missing, prints the tables, and can be stopped at any time."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saliency_reg.errors import SaliencyRegError

from ..runs.command_line import Parser, real_number, whole_number
from ..runtime.errors import RecipeError, need
from ..runtime.files import locked
from ..runtime.run_folder import INTERRUPTED
from ..runtime.termination import TERMINATED, Terminated, listening
from ..runtime.workers import Workers
from .results_file import CellFile
from .study import FIRST_TUNING_SEED, Setting, Study, TrainCell
from .tables import markdown

__all__ = ["GridCommand"]


@dataclass(frozen=True)
class GridCommand:
    """What one study adds to the common command.

    Attributes:
        name: of the module, such as ``"cifar_grid"``.
        description: for ``--help``.
        settings: by key, in the order in which they are trained.
        metrics: columns of the tables.
        compared: columns of paired differences to hard sharing.
        data: default of ``--data``, and what it is.
        packages: that have to be there.
        fingerprint: of the data, from ``--data``.
        trainer: from ``--data`` and a deadline to what trains a cell, in any process.
    """

    name: str
    description: str
    settings: Mapping[str, Setting]
    metrics: tuple[str, ...]
    compared: tuple[str, ...]
    data: tuple[str | None, str]
    packages: tuple[str, ...]
    fingerprint: Callable[[str], str]
    trainer: Callable[[str, float | None], TrainCell]

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Train what is missing, print the tables, and return the exit code."""
        for package in ("sklearn", "tqdm", "accelerate", *self.packages):
            need(package)
        parser = self._parser()
        options = parser.parse_args(arguments)
        try:
            return self._run(parser, options)
        except (RecipeError, SaliencyRegError) as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1

    def _run(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
        path: Path = options.results
        settings = [self.settings[key] for key in options.settings]
        tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
        code = 0
        with contextlib.ExitStack() as held:
            trains = options.minutes is None or options.minutes > 0
            if trains:
                self._lock(parser, path, held)
            cells = CellFile(path)
            study = Study(settings, range(options.seeds), tuning_seeds, cells)
            if trains and study.done < study.trainings:
                self._check_data(parser, options, cells)
                code = self._train(study, options)
        print(markdown(study, self.metrics, self.compared))
        print(f"\n{study.done} of {study.trainings} trainings are done. Results: {path}")
        return code

    def _lock(self, parser: argparse.ArgumentParser, path: Path, held: contextlib.ExitStack) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(path.parent))
        except BlockingIOError:
            parser.error(f"argument --results: another run is at work in {path.parent}. Stop it, or pass another file.")
        except OSError as error:
            parser.error(f"argument --results: cannot write in {path.parent} ({error.strerror}). Pass another file.")

    def _check_data(self, parser: argparse.ArgumentParser, options: argparse.Namespace, cells: CellFile) -> None:
        if options.data is None:
            parser.error(f"argument --data: needed for the trainings that are missing. Use {self.data[1]}.")
        found = self.fingerprint(options.data)
        if not cells.data <= {found}:
            parser.error(
                f"argument --data: the results in {options.results} are of other data than {options.data}. Pass another "
                "--results."
            )

    def _train(self, study: Study, options: argparse.Namespace) -> int:
        deadline = None if options.minutes is None else time.time() + 60 * options.minutes
        bar = need("tqdm").tqdm(total=study.trainings, initial=study.done, unit="training", disable=None)
        try:
            with listening(), bar, Workers(options.workers) as workers:
                for cell in study.run(
                    functools.partial(workers.run_all, ordered=False), self.trainer(options.data, deadline)
                ):
                    bar.set_postfix_str(f"{cell.setting.key}, {cell.method.key}, seed {cell.seed}")
                    bar.update()
        except KeyboardInterrupt:
            print("\nInterrupted. What follows is from the trainings that were finished.")
            return INTERRUPTED
        except Terminated:
            print("\nTerminated. Run the same command again to go on.")
            return TERMINATED
        return 0

    def _parser(self) -> argparse.ArgumentParser:
        parser = Parser(prog=f"python -m recipes.{self.name}", description=self.description)
        default, what = self.data
        parser.add_argument(
            "--data", default=default, metavar="DATA", help=f"{what}{f' (default: {default})' if default else ''}"
        )
        parser.add_argument(
            "--settings",
            nargs="+",
            choices=list(self.settings),
            default=list(self.settings),
            metavar="SETTING",
            help=f"some of {', '.join(self.settings)} (default: all, in this order)",
        )
        for name, default_count, text in (
            ("--seeds", 5, "reported: 0, 1, ..."),
            ("--tuning-seeds", 2, f"of each trial: {FIRST_TUNING_SEED}, ..."),
            ("--workers", 2, "trainings at a time, of one thread each; the numbers do not depend on it"),
        ):
            parser.add_argument(
                name,
                type=whole_number(1),
                default=default_count,
                metavar="N",
                help=f"{text} (default: {default_count})",
            )
        parser.add_argument(
            "--minutes",
            type=real_number(above_zero=False),
            metavar="X",
            help="after which no training begins; 0 only prints the tables (default: no limit)",
        )
        file = Path("runs", self.name, "results.jsonl")
        parser.add_argument(
            "--results",
            type=Path,
            default=file,
            metavar="FILE",
            help=f"what is there is not computed again (default: {file})",
        )
        return parser
