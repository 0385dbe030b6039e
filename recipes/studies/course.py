"""One start of a study: it trains what is missing, and says and writes what is known."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.files import locked, machine, now, versions
from ..runtime.processes import Ranks
from ..runtime.run_folder import INTERRUPTED, NOT_WRITTEN
from ..runtime.termination import TERMINATED, Terminated, deferred, listening
from ..runtime.workers import Workers
from .cell_training import CellTraining
from .comparison.report.table import further_figures
from .page import Origin
from .progress import told
from .results_file import ResultsFile
from .snapshot import Snapshot
from .study import FIRST_TUNING_SEED, Study
from .tables import as_numbers
from .written import summary, write_beside

if TYPE_CHECKING:
    from .command import StudyCommand

SCHEMA_VERSION = 4


class Course:
    """One start of a study."""

    def __init__(
        self,
        command: StudyCommand,
        parser: argparse.ArgumentParser,
        options: argparse.Namespace,
        ranks: Ranks,
        typed: str,
    ) -> None:
        self._command = command
        self._parser = parser
        self._options = options
        self._ranks = ranks
        self._typed = typed
        self._path: Path = options.results
        self._began = time.monotonic()
        self._introduction = ""
        if ranks.size > 1 and options.workers not in (None, 1):
            parser.error(
                f"argument --workers: the {ranks.size} processes that were started share each training, and there are no "
                f"other workers. Leave --workers out, or start the recipe with {parser.prog}."
            )
        default = 1 if ranks.size > 1 else min(command.workers, os.cpu_count() or 1)
        options.workers = options.workers or default

    def run(self) -> int:
        options, command, ranks = self._options, self._command, self._ranks
        code, trains = 0, options.minutes is None or options.minutes > 0
        with contextlib.ExitStack() as held:
            if trains:
                ranks.by_main("lock the folder of the study", lambda: self._lock(held))
            study = self._study()
            if trains and study.done < study.trainings:
                data = self._check_data(study)
                if command.introduction is not None:
                    self._introduction = command.introduction(options)  # data that are not needed need not be there
                    self._print(self._introduction)
                if ranks.size > 1:
                    self._print(f"Each training is shared by {ranks.size} processes, the batch included.")
                code = self._train(study, data)
            if code == TERMINATED or not ranks.is_main:
                return code
            return self._conclude(study, code, trains)

    def _study(self) -> Study:
        options, command, ranks = self._options, self._command, self._ranks
        settings = list(command.settings_of(options).values())
        if options.settings:
            settings = [own for own in settings if own.key in options.settings]
        if options.methods:
            settings = [replace(own, methods=tuple(options.methods)) for own in settings]
        if command.searches and options.trials is not None:
            settings = [setting.searched(options.trials) for setting in settings]
        results = ranks.by_main("read the results", lambda: ResultsFile(self._path))
        tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
        if not ranks.is_main:
            results.writes = False
        return Study(settings, range(options.seeds), tuning_seeds, results, command.methods, command.baseline)

    def _lock(self, held: contextlib.ExitStack) -> None:
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder))
        except BlockingIOError:
            self._parser.error(
                f"argument --results: another run is at work in {folder}. Stop it, or pass another file or --name."
            )
        except OSError as error:
            self._parser.error(
                f"argument --results: cannot write in {folder} ({error.strerror}). Pass another file or --out."
            )

    def _check_data(self, study: Study) -> str:
        command = self._command
        place = command.place(self._options)
        if place is None and command.data is not None:
            self._parser.error(f"argument --data: needed for the trainings that are missing. Use {command.data[1]}.")
        found = "" if command.fingerprint is None else command.fingerprint(place)
        if not study.results.data <= {found}:
            self._parser.error(
                f"argument --data: the results in {self._path} are of other data than these. Pass another --results."
            )
        return found

    def _train(self, study: Study, data: str) -> int:
        options = self._options
        deadline = None if options.minutes is None else time.time() + 60 * options.minutes
        folder = self._path.parent / "trainings"
        tracked = bool(getattr(options, "trackers", ()))
        place = self._command.place(options)
        work = CellTraining(self._command.train, place, data, folder, deadline, tracked, self._ranks)
        several = self._ranks.size > 1
        try:
            # Several processes have to end at one place: only the engine knows one.
            with (
                listening(),
                deferred() if several else contextlib.nullcontext(),
                Workers(options.workers) as workers,
                told(study, self._ranks.is_main) as tell,
            ):
                run_all = functools.partial(workers.run_all, ordered=several)
                for cell, result in study.run(run_all, work):
                    tell(cell, result)
                    work.forget(cell)
        except KeyboardInterrupt:
            self._print("\nInterrupted. What follows is from the trainings that were finished.")
            return INTERRUPTED
        except Terminated:
            self._print("\nTerminated. Run the same command again to go on.")
            return TERMINATED
        if self._ranks.is_main:
            work.forget_all(study.results)
            with contextlib.suppress(OSError):  # there is something in it, or there was nothing to save
                folder.rmdir()
        return 0

    def _conclude(self, study: Study, code: int, trains: bool) -> int:
        command, path, study = self._command, self._path, Snapshot(study)
        columns = command.metrics, command.compared, command.judged
        comparison = None if command.comparison is None else command.comparison(self._options)
        own = None if command.report is None else command.report(self._options)
        # What a full disk cannot take away comes first.
        print(summary(study, columns, comparison) if own is None else own.summary(study))
        print(f"\n{study.done} of {study.trainings} trainings are done. Results: {path}", flush=True)
        if not trains:
            if command.draw is not None:
                print(f"\n{command.draw(study, None)}".rstrip())
            return code
        about = command.description.partition("\n")[0]
        origin = Origin(command.name, about, self._typed, introduction=self._introduction)
        try:
            if own is not None:
                written = own.write(path, study, origin)
            else:
                content = self._content(study, code)
                written = write_beside(path, study, origin, content, columns, command.draw, comparison)
        except KeyboardInterrupt:
            return INTERRUPTED
        if written.further:
            print(f"\n{written.further}")
        names = sorted(own.name for own in path.parent.iterdir() if not own.name.startswith("."))
        print(f"\n{time.monotonic() - self._began:.0f} s. In {path.parent}: {', '.join(names)}")
        if written.missing:
            print(f"Not written: {'; '.join(f'{name} ({why})' for name, why in written.missing.items())}")
        if written.page is not None:
            print(f"Open this page in a browser: {written.page.resolve().as_uri()}")
        return code or (NOT_WRITTEN if written.missing else 0)

    def _content(self, study: Study, code: int) -> dict[str, Any]:
        columns = self._command.metrics, self._command.compared, self._command.judged
        hidden = ("out", "name", "results", "minutes")
        return {
            "schema_version": SCHEMA_VERSION,
            "recipe": self._command.name,
            "status": "interrupted" if code else "complete" if study.done == study.trainings else "running",
            "date": now(),
            "options": {name: value for name, value in vars(self._options).items() if name not in hidden},
            "versions": versions(),
            "machine": machine(),
            "processes": self._ranks.size,
            **as_numbers(study, self._command.metrics, functools.partial(further_figures, study, columns=columns)),
        }

    def _print(self, text: str) -> None:
        if self._ranks.is_main and text:
            print(text, flush=True)
