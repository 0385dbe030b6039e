"""The command line of a study: it trains what is missing, prints the tables, and can be stopped at any time."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saliency_reg.errors import SaliencyRegError

from ..methods.methods import BASELINE, HARD_SHARING, METHODS, Methods
from ..runs.command_line import COUNT, NON_NEGATIVE, Parser, add_number, folder_name, method_name, whole_number
from ..runtime.errors import RecipeError, need
from ..runtime.processes import Ranks, started_ranks
from .cell_training import TrainOne
from .comparison.report.options import Comparison
from .course import Course
from .study import FIRST_TUNING_SEED, Setting, Study
from .written import WRITTEN_BESIDE, OwnReport


@dataclass(frozen=True)
class StudyCommand:
    """What one study adds to the common command.

    Attributes:
        name: of the module, such as ``"cifar_grid"``.
        description: for ``--help``.
        settings: from the command line to the settings by key, in the order in which they are trained.
        metrics: columns of the tables.
        compared: columns of paired differences to the baseline.
        judged: the verdict is about the first that a setting has; by default the first that is ``compared``.
        train: one cell: from the cell, the data, and a folder for its checkpoints.
        packages: that have to be there.
        data: default of ``--data``, and what it is; ``None`` for data that need no place.
        place: what ``train`` gets as data, from the command line; ``--data`` by default.
        fingerprint: of the data, from their place.
        add_arguments: options of its own, and ``check``, which refuses what cannot go together.
        introduction: said before the trainings, from the command line.
        draw: pictures of a study into a folder, if there is one; returns further tables to print.
        methods: that can be compared, by key, and the ``baseline``.
        searches: ``--trials`` searches within the bounds of grids; otherwise the study has a ``--trials`` of its own.
        architectures: those that it can build.
        seeds, tuning_seeds, workers: defaults.
        comparison: from the command line to what makes its report that of a comparison of many methods.
        report: from the command line to a report of another kind, of a study that trains one method and compares nothing:
            then no options choose settings or methods, or tune them.
    """

    name: str
    description: str
    settings: Mapping[str, Setting] | Callable[[argparse.Namespace], Mapping[str, Setting]]
    metrics: tuple[str, ...]
    compared: tuple[str, ...]
    train: TrainOne
    judged: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    data: tuple[str | None, str] | None = None
    place: Callable[[argparse.Namespace], Any] = lambda options: getattr(options, "data", None)
    fingerprint: Callable[[Any], str] | None = None
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] | None = None
    introduction: Callable[[argparse.Namespace], str] | None = None
    draw: Callable[[Study, Path | None], str] | None = None
    methods: Methods = field(default_factory=lambda: METHODS)
    baseline: str = BASELINE
    architectures: tuple[str, ...] = (HARD_SHARING,)
    searches: bool = True
    seeds: int = 5
    tuning_seeds: int = 2
    workers: int = 2
    comparison: Callable[[argparse.Namespace], Comparison] | None = None
    report: Callable[[argparse.Namespace], OwnReport] | None = None

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Train what is missing, print the tables, and return the exit code."""
        given = sys.argv[1:] if arguments is None else list(arguments)
        try:
            for package in ("sklearn", "tqdm", "accelerate", "optuna", "matplotlib", "jinja2", *self.packages):
                need(package)
            parser = self._parser()
            options = parser.parse_args(given)
            self._check(parser, options)
            with started_ranks() as state:
                return Course(self, parser, options, Ranks(state), shlex.join([*parser.prog.split(), *given])).run()
        except (RecipeError, SaliencyRegError) as error:
            print(f"python -m recipes.{self.name}: error: {error}", file=sys.stderr)
            return 1

    def options_of(self, arguments: Sequence[str]) -> argparse.Namespace:
        """What a command line says; it ends the process if that cannot be."""
        parser = self._parser()
        options = parser.parse_args(arguments)
        self._check(parser, options)
        return options

    def settings_of(self, options: argparse.Namespace) -> Mapping[str, Setting]:
        """The tables, by key."""
        return self.settings(options) if callable(self.settings) else self.settings

    def _parser(self) -> argparse.ArgumentParser:
        parser = Parser(prog=f"python -m recipes.{self.name}", description=self.description)
        if self.add_arguments is not None:
            self.add_arguments(parser)
        if self.data is not None:
            default, what = self.data
            shown = f" (default: {default})" if default else ""
            parser.add_argument("--data", default=default, metavar="DATA", help=f"{what}{shown}")
        study = parser.add_argument_group("study")
        if self.report is not None:
            add_number(study, "--seeds", self.seeds, "how many trainings, of seeds 0, 1, ...")
            parser.set_defaults(settings=None, methods=None, tuning_seeds=0, trials=None)
        else:
            self._add_comparison(study)
        run = parser.add_argument_group("run")
        workers = min(self.workers, os.cpu_count() or 1)
        text = "trainings at a time, in processes of one thread each; the numbers do not depend on it"
        run.add_argument("--workers", type=COUNT, metavar="N", help=f"{text} (default: {workers})")
        text = "after which no training begins; 0 only prints what is known (default: no limit)"
        add_number(run, "--minutes", None, text, NON_NEGATIVE)
        folder = Path("runs", self.name)
        text = f"of results.jsonl, in which nothing is computed twice, and of tables and pictures (default: {folder})"
        run.add_argument("--out", type=Path, metavar="FOLDER", help=text)
        run.add_argument("--name", type=folder_name, help="of a folder in it (default: none)")
        run.add_argument(
            "--results", type=Path, metavar="FILE", help="in place of --out and --name; the rest goes beside it"
        )
        return parser

    def _add_comparison(self, study: Any) -> None:
        study.add_argument("--settings", nargs="+", metavar="SETTING", help="some of the tables (default: all)")
        study.add_argument(
            "--methods",
            nargs="+",
            type=functools.partial(method_name, methods=self.methods),
            metavar="METHOD",
            help=f"some of {', '.join(self.methods)}{self.methods.hint} (default: those of the tables)",
        )
        add_number(study, "--seeds", self.seeds, "how many seeds are reported: 0, 1, ...")
        add_number(
            study,
            "--tuning-seeds",
            self.tuning_seeds,
            f"how many seeds tune the hyper-parameters: {FIRST_TUNING_SEED}, ...",
        )
        text = "values that each method tries, chosen by Optuna between those of its grid above 0 (default: the grid)"
        if self.searches:
            add_number(study, "--trials", None, text, whole_number(2))

    def _check(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
        if self.check is not None:
            self.check(parser, options)
        for name in ("out", "name") if options.results is not None else ():
            if getattr(options, name) is not None:
                parser.error(f"argument --{name}: --results names the folder, too. Leave one of them out.")
        if options.results is None:
            options.results = Path(options.out or Path("runs", self.name), options.name or "", "results.jsonl")
        if options.results.suffix in WRITTEN_BESIDE:
            parser.error(
                f"argument --results: a file with one line for each training, beside which {options.results.name} is "
                f"written. Use {options.results.with_suffix('.jsonl').name}."
            )
        if options.seeds > FIRST_TUNING_SEED:
            parser.error(
                f"argument --seeds: seeds from {FIRST_TUNING_SEED} on tune. Use --seeds {FIRST_TUNING_SEED} or less."
            )
        for name, known in (("settings", self.settings_of(options)), ("methods", self.methods)):
            given = getattr(options, name) or ()
            if unknown := [key for key in given if key not in known]:
                parser.error(f"argument --{name}: found {unknown[0]!r}. Use some of {', '.join(known)}.")
            if len(set(given)) < len(given):
                parser.error(f"argument --{name}: the same value twice. Use each value once.")
        for setting in self.settings_of(options).values() if options.methods else ():
            for method in (self.methods[key] for key in options.methods):
                if method.architecture not in self.architectures:
                    parser.error(
                        f"argument --methods: {method.key} has an architecture that this recipe cannot build, "
                        f"{method.architecture}. Use it in recipes.compare."
                    )
                if not setting.has_space(method):
                    usable = ", ".join(key for key, own in self.methods.items() if setting.has_space(own))
                    parser.error(
                        f"argument --methods: {setting.key} has no values to try for the {setting.parameter(method)} of "
                        f"{method.key}. Use some of {usable}."
                    )
