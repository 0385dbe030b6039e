"""The course of a recipe that trains many models: a folder, results.json on the way, and an end that Ctrl-C cannot spoil."""

from __future__ import annotations

import argparse
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .extras import need
from .runs import machine, new_run_folder, now, versions, write_json
from .workers import Workers

__all__ = ["FIRST_TUNING_SEED", "INTERRUPTED", "StudyRun", "open_folder"]

FIRST_TUNING_SEED = 1000
#: Exit code of a program that Ctrl-C ended.
INTERRUPTED = 130
#: Writing results.json takes longer than the smallest trainings.
SECONDS_BETWEEN_SAVES = 1.0


def open_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """The new folder of a run, from its ``--out`` and ``--name``."""
    try:
        return new_run_folder(options.out, options.name)
    except FileExistsError:
        taken = options.name or "a folder of this second"
        parser.error(f"argument --name: {taken} exists in {options.out}. Type another --name.")
    except OSError as error:
        parser.error(f"argument --out: cannot create a folder in {options.out} ({error.strerror}). Type another --out.")


class StudyRun(ABC):
    """One comparison and the folder it goes to.

    Args:
        folder: exists, and is empty.
        options: of the command line; ``out`` and ``name`` are kept out of the results.
        recipe: its name.
        schema_version: of its results.json.
    """

    def __init__(self, folder: Path, options: argparse.Namespace, recipe: str, schema_version: int) -> None:
        self.folder = folder
        self.options = options
        self.status = "running"
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
            self.train()
            self.status = "complete"
        except KeyboardInterrupt:
            print("\nInterrupted. What follows is from the trainings that were finished.")
            self.status = "interrupted"
        try:
            self.show(self.save())
            print(f"\n{time.monotonic() - self._started:.0f} s. Written to {self.folder}: ", end="")
            print(", ".join(sorted(path.name for path in self.folder.iterdir())))
        except KeyboardInterrupt:  # again: results.json is there, the pictures may not be
            return INTERRUPTED
        return 0 if self.status == "complete" else INTERRUPTED

    def follow(self, total: int, trainings: Callable[[Workers], Iterable[Any]]) -> None:
        """Draw the trainings from the workers, with a progress bar; results.json is brought up to date on the way."""
        self.save()
        bar = need("tqdm").tqdm(total=total, desc="tuning", unit="training", disable=None)
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
            "options": {name: value for name, value in vars(self.options).items() if name not in ("out", "name")},
            **self._house,
            **self.content(),
        }
        write_json(self.folder / "results.json", content)
        self._saved = time.monotonic()
        return content
