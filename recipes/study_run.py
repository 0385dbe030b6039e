"""The course of a recipe that trains many models: a folder, results.json on the way, and an end that Ctrl-C cannot spoil."""

from __future__ import annotations

import argparse
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .extras import need
from .ranks import Ranks
from .runs import machine, new_run_folder, now, versions, write_json
from .termination import TERMINATED, Terminated, deferred
from .workers import Workers

__all__ = ["FIRST_TUNING_SEED", "INTERRUPTED", "StudyRun", "open_folder", "open_shared_folder"]

FIRST_TUNING_SEED = 1000
#: Exit code of a program that Ctrl-C ended.
INTERRUPTED = 130
#: Writing results.json takes longer than the smallest trainings.
SECONDS_BETWEEN_SAVES = 1.0


#: Options that change no number.
_WITHOUT_EFFECT = ("out", "name", "resume")
_MAY_CHANGE = (*_WITHOUT_EFFECT, "workers", "data_workers", "checkpoint_steps", "trackers")


def open_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """The folder of a run, from its ``--out``, ``--name`` and, where there is one, ``--resume``."""
    resume = getattr(options, "resume", "never")
    if resume not in ("auto", "never"):
        folder = Path(resume)
        if not folder.is_dir():
            parser.error(f"argument --resume: {folder} is no folder. Type auto, never, or the folder of a run.")
        _check_same_run(parser, options, folder)
        return folder
    if resume == "auto":
        if options.name is None:
            parser.error("argument --resume: auto goes on in the folder of a name. Type --name, too.")
        folder = Path(options.out, options.name)
        if folder.is_dir():
            _check_same_run(parser, options, folder)
            return folder
    try:
        return new_run_folder(options.out, options.name)
    except FileExistsError:
        taken = options.name or "a folder of this second"
        parser.error(f"argument --name: {taken} exists in {options.out}. Type another --name.")
    except OSError as error:
        parser.error(f"argument --out: cannot create a folder in {options.out} ({error.strerror}). Type another --out.")


def open_shared_folder(parser: argparse.ArgumentParser, options: argparse.Namespace, ranks: Ranks) -> Path:
    """The same in several processes: the main one opens it, and all get it."""
    try:
        folder = open_folder(parser, options) if ranks.is_main else None
    except SystemExit as stop:
        ranks.from_main((None, stop.code))
        raise
    shared, code = ranks.from_main((folder, 0))
    if shared is None:
        raise SystemExit(code)
    return Path(shared)


def _check_same_run(parser: argparse.ArgumentParser, options: argparse.Namespace, folder: Path) -> None:
    try:
        content: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # it was stopped before its first training
    except ValueError as error:
        parser.error(f"argument --resume: {folder / 'results.json'} cannot be read ({error}). Type another --name.")
    before = content.get("options", {})
    for name, value in vars(options).items():
        if name not in _MAY_CHANGE and before.get(name) != value:
            option = "--" + name.replace("_", "-")
            parser.error(
                f"argument --resume: the run in {folder} had {option} {_typed(before.get(name))}, but found "
                f"{_typed(value)}. Type the same options as before, or another --name."
            )


def _typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class StudyRun(ABC):
    """One comparison and the folder it goes to.

    Args:
        folder: exists.
        options: of the command line; those of the place are kept out of the results.
        recipe: its name.
        schema_version: of its results.json.
        ranks: the processes, of which only the main one writes and prints; a single one by default.
    """

    def __init__(
        self,
        folder: Path,
        options: argparse.Namespace,
        recipe: str,
        schema_version: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.folder = folder
        self.options = options
        self.status = "running"
        self.is_main = ranks is None or ranks.is_main
        self._several = ranks is not None and ranks.size > 1
        self._recipe = recipe
        self._schema_version = schema_version
        self._date = now()
        self._started = time.monotonic()
        self._saved = -SECONDS_BETWEEN_SAVES
        self._house = {"versions": versions(), "machine": machine()}

    @abstractmethod
    def train(self) -> None:
        """All trainings."""

    @abstractmethod
    def content(self) -> dict[str, Any]:
        """What results.json holds beside the head that all recipes share."""

    @abstractmethod
    def show(self, content: dict[str, Any]) -> None:
        """Print the tables and draw the pictures of what there is."""

    def run(self) -> int:
        """Train, conclude, and return the exit code."""
        try:
            # Several processes have to end at one place: only the engine knows one.
            with deferred() if self._several else nullcontext():
                self.train()
            self.status = "complete"
        except KeyboardInterrupt:
            self._print("\nInterrupted. What follows is from the trainings that were finished.")
            self.status = "interrupted"
        except Terminated:
            return self._end_terminated()
        try:
            content = self.save()
            if self.is_main:
                self.show(content)
            self._print(f"\n{time.monotonic() - self._started:.0f} s. Written to {self.folder}: {self._written()}")
        except KeyboardInterrupt:  # again: results.json is there, the pictures may not be
            return INTERRUPTED
        except Terminated:
            return self._end_terminated()
        return 0 if self.status == "complete" else INTERRUPTED

    def _end_terminated(self) -> int:
        # Whoever terminates has little patience: no pictures.
        self.status = "terminated"
        self.save()
        place = f"--out {self.folder.parent} --name {self.folder.name}"
        self._print(f"\nTerminated. To go on, type the same command with {place} --resume auto.")
        return TERMINATED

    def _written(self) -> str:
        return ", ".join(sorted(path.name for path in self.folder.iterdir()))

    def _print(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def follow(self, total: int, trainings: Callable[[Workers], Iterable[Any]]) -> None:
        """Draw the trainings from the workers, with a progress bar; results.json is brought up to date on the way."""
        self.save()
        bar = need("tqdm").tqdm(total=total, desc="tuning", unit="training", disable=None if self.is_main else True)
        with bar, Workers(self.options.workers) as workers:
            for trained in trainings(workers):
                if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
                    self.save()
                bar.set_description("reported" if trained.job.reported else "tuning")
                bar.set_postfix_str(f"last: {trained.job.method.label}, seed {trained.job.seed}")
                bar.update()

    def save(self) -> dict[str, Any]:
        """Write results.json and return its content."""
        content = {
            "schema_version": self._schema_version,
            "recipe": self._recipe,
            "status": self.status,
            "date": self._date,
            "wall_seconds": round(time.monotonic() - self._started, 2),
            "options": {name: value for name, value in vars(self.options).items() if name not in _WITHOUT_EFFECT},
            **self._house,
            **self.content(),
        }
        if self.is_main:
            write_json(self.folder / "results.json", content)
        self._saved = time.monotonic()
        return content
