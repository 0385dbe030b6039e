"""The course of a recipe that trains many models: a folder, results.json on the way, and an end that Ctrl-C cannot spoil."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from saliency_reg.errors import SaliencyRegError

from .errors import RecipeError
from .extras import need
from .ranks import Ranks, started_ranks
from .runs import LOCK, locked, machine, new_run_folder, now, versions, write_json
from .termination import TERMINATED, Terminated, deferred
from .workers import Workers

__all__ = [
    "FIRST_TUNING_SEED",
    "INTERRUPTED",
    "NOT_WRITTEN",
    "StudyRun",
    "in_ranks",
    "open_folder",
    "open_shared_folder",
    "results_in",
]

FIRST_TUNING_SEED = 1000
#: Exit code of a program that Ctrl-C ended.
INTERRUPTED = 130
#: Exit code of a run whose files are not all there.
NOT_WRITTEN = 1
RESULTS = "results.json"
#: Writing results.json takes longer than the smallest trainings.
SECONDS_BETWEEN_SAVES = 1.0


#: Options that change no number.
_WITHOUT_EFFECT = ("out", "name", "resume")
_MAY_CHANGE = (*_WITHOUT_EFFECT, "workers", "data_workers", "checkpoint_steps", "trackers")


def in_ranks(parser: argparse.ArgumentParser, run: Callable[[Ranks], int]) -> int:
    """Run a recipe that trains one model in as many processes as were started, and return the exit code.

    Args:
        parser: whose name errors begin with.
        run: in each process.
    """
    with started_ranks() as state:
        try:
            return run(Ranks(state))
        except (RecipeError, SaliencyRegError) as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nInterrupted. Run the same command with the --name of the run and --resume auto to go on.")
            return INTERRUPTED


def open_folder(
    parser: argparse.ArgumentParser, options: argparse.Namespace, kind: tuple[str, int] | None = None
) -> Path:
    """The folder of a run, from its ``--out``, ``--name`` and, where there is one, ``--resume``.

    Args:
        parser: of the options, for errors.
        options: of the command line.
        kind: recipe and schema version of a run that can be resumed.
    """
    resume = getattr(options, "resume", "never")
    if resume not in ("auto", "never"):
        folder = Path(resume)
        if not folder.is_dir():
            parser.error(f"argument --resume: {folder} is no folder. Use auto, never, or the folder of a run.")
        if not (folder / RESULTS).exists():
            parser.error(
                f"argument --resume: {folder} has no {RESULTS}, so it is not the folder of a run. Use auto with the --name "
                "of a run, never, or the folder of a run."
            )
        _check_same_run(parser, options, folder, kind)
        return folder
    if resume == "auto":
        if options.name is None:
            parser.error("argument --resume: auto goes on in the folder of a name. Use --name, too.")
        folder = Path(options.out, options.name)
        if folder.is_dir():
            _check_same_run(parser, options, folder, kind)
            return folder
    try:
        return new_run_folder(options.out, options.name)
    except FileExistsError:
        taken = options.name or "a folder of this second"
        parser.error(f"argument --name: {taken} exists in {options.out}. Pass another --name.")
    except OSError as error:
        parser.error(f"argument --out: cannot create a folder in {options.out} ({error.strerror}). Pass another --out.")


def results_in(folder: Path) -> dict[str, Any]:
    """What an earlier start of a run has written; empty where there is nothing to read."""
    try:
        content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def open_shared_folder(
    parser: argparse.ArgumentParser, options: argparse.Namespace, ranks: Ranks, kind: tuple[str, int]
) -> Iterator[Path]:
    """The same in several processes: the main one opens it, locks it within the context, and all get it."""
    with contextlib.ExitStack() as held:
        try:
            folder = open_folder(parser, options, kind) if ranks.is_main else None
            if folder is not None:
                _lock(parser, folder, held)
        except SystemExit as stop:
            ranks.from_main((None, stop.code))
            raise
        shared, code = ranks.from_main((folder, 0))
        if shared is None:
            raise SystemExit(code)
        yield Path(shared)


def _lock(parser: argparse.ArgumentParser, folder: Path, held: contextlib.ExitStack) -> None:
    try:
        held.enter_context(locked(folder))
    except BlockingIOError:
        parser.error(
            f"argument --name: another run is at work in {folder} and holds {folder / LOCK}. Pass another --name, or stop "
            "the other run."
        )


def _check_same_run(
    parser: argparse.ArgumentParser, options: argparse.Namespace, folder: Path, kind: tuple[str, int] | None
) -> None:
    path = folder / RESULTS
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # it was stopped before its first training
    except (OSError, ValueError) as error:
        parser.error(f"argument --resume: {path} cannot be read ({error}). Pass another --name.")
    found = (content.get("recipe"), content.get("schema_version")) if isinstance(content, dict) else (None, None)
    if kind is not None and found != kind:
        parser.error(
            f"argument --resume: {path} is of the recipe {found[0]!r} with schema version {found[1]!r}, expected "
            f"{kind[0]!r} with {kind[1]!r}. Pass the folder of such a run, or another --name."
        )
    before = content.get("options", {})
    for name, value in vars(options).items():
        if name not in _MAY_CHANGE and before.get(name) != value:
            option = "--" + name.replace("_", "-")
            parser.error(
                f"argument --resume: the run in {folder} had {option} {_typed(before.get(name))}, but found "
                f"{_typed(value)}. Pass the same options as before, or another --name."
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
        before = _read(folder / RESULTS) if self.is_main else {}
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
            "options": {name: value for name, value in vars(self.options).items() if name not in _WITHOUT_EFFECT},
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


def _read(path: Path) -> dict[str, Any]:
    """Of a run that is resumed, whose options were checked; otherwise nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _sessions(before: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a run so far; results.json did not always list them."""
    if "date" not in before:
        return []
    one = {"date": before["date"], "seconds": before["wall_seconds"], "versions": before["versions"]}
    return list(before.get("sessions", [one]))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
