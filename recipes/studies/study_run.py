"""The course of a recipe that trains many models: a folder, results.json on the way, and an end that Ctrl-C cannot spoil."""

from __future__ import annotations

import argparse
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from saliency_reg.errors import SaliencyRegError

from ..runtime.errors import need
from ..runtime.files import LOCK, machine, now, versions, write_json
from ..runtime.processes import Ranks
from ..runtime.run_folder import INTERRUPTED, NOT_WRITTEN, RESULTS, WITHOUT_EFFECT, results_in
from ..runtime.termination import TERMINATED, Terminated, deferred
from ..runtime.workers import Workers

__all__ = [
    "FIRST_TUNING_SEED",
    "StudyRun",
]

FIRST_TUNING_SEED = 1000
#: Writing results.json takes longer than the smallest trainings.
SECONDS_BETWEEN_SAVES = 1.0


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
        before = results_in(folder) if self.is_main else {}
        self._was_complete = before.get("status") == "complete"
        self._sessions = _sessions(before)
        self._date = now()
        self._trained_anew = False
        self._not_written: dict[str, str] = {}
        self._started = time.monotonic()
        self._saved = -SECONDS_BETWEEN_SAVES
        self._versions = versions()
        self._machine = machine()

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
                self._show(content)
            self._print(f"\n{time.monotonic() - self._started:.0f} s. Written to {self.folder}: {self._written()}")
        except KeyboardInterrupt:  # again: results.json is there, the pictures may not be
            return INTERRUPTED
        except Terminated:
            return self._end_terminated()
        if self._not_written:
            self._print(f"Not written: {'; '.join(f'{name} ({why})' for name, why in self._not_written.items())}")
        if self.status != "complete":
            return INTERRUPTED
        return NOT_WRITTEN if self._not_written else 0

    def _show(self, content: dict[str, Any]) -> None:
        try:
            self.show(content)
        except (OSError, SaliencyRegError) as error:
            self._warn_not_written("pictures", error)

    def _warn_not_written(self, name: str, error: Exception) -> None:
        if name not in self._not_written:
            warnings.warn(
                f"{name} could not be written in {self.folder} ({_reason(error)}). The run goes on without it.",
                stacklevel=2,
            )
        self._not_written[name] = _reason(error)

    def _end_terminated(self) -> int:
        # Whoever terminates has little patience: no pictures.
        self.status = "terminated"
        self.save()
        place = f"--out {self.folder.parent} --name {self.folder.name}"
        self._print(f"\nTerminated. To go on, run the same command with {place} --resume auto.")
        return TERMINATED

    def _written(self) -> str:
        return ", ".join(sorted(path.name for path in self.folder.iterdir() if path.name != LOCK))

    def _print(self, text: str) -> None:
        if self.is_main:
            print(text, flush=True)

    def follow(self, total: int, trainings: Callable[[Workers], Iterable[Any]]) -> None:
        """Draw the trainings from the workers, with a progress bar; results.json is brought up to date on the way."""
        self.save()
        bar = need("tqdm").tqdm(total=total, desc="tuning", unit="training", disable=None if self.is_main else True)
        with bar, Workers(self.options.workers) as workers:
            for trained in trainings(workers):
                self._trained_anew |= not getattr(trained, "restored", False)
                if (not_written := getattr(trained, "not_written", None)) is not None:
                    self._not_written.update([not_written])
                if time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
                    self.save()
                bar.set_description("reported" if trained.job.reported else "tuning")
                bar.set_postfix_str(f"last: {trained.job.method.label}, seed {trained.job.seed}")
                bar.update()

    def save(self) -> dict[str, Any]:
        """Write results.json and return its content; that of a complete run stays unless something is trained again."""
        sessions = [
            *self._sessions,
            {
                "date": self._date,
                "seconds": round(time.monotonic() - self._started, 2),
                "versions": self._versions,
            },
        ]
        content = {
            "schema_version": self._schema_version,
            "recipe": self._recipe,
            "status": self.status,
            "date": sessions[0]["date"],
            "wall_seconds": round(sum(session["seconds"] for session in sessions), 2),
            "sessions": sessions,
            "options": {name: value for name, value in vars(self.options).items() if name not in WITHOUT_EFFECT},
            "versions": self._versions,
            "machine": self._machine,
            **self.content(),
        }
        if self.is_main and (self._trained_anew or not self._was_complete):
            try:
                write_json(self.folder / RESULTS, content)
                self._not_written.pop(RESULTS, None)
            except OSError as error:
                self._warn_not_written(RESULTS, error)
        self._saved = time.monotonic()
        return content


def _sessions(before: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a run so far; results.json did not always list them."""
    if "date" not in before:
        return []
    one = {"date": before["date"], "seconds": before["wall_seconds"], "versions": before["versions"]}
    return list(before.get("sessions", [one]))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
