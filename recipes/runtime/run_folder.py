"""The folder of a run, opened anew or to go on, and what its end is told by."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from saliency_reg.errors import SaliencyRegError

from .errors import RecipeError
from .files import LOCK, locked, new_run_folder
from .processes import Ranks, started_ranks

#: Exit code of a program that Ctrl-C ended.
INTERRUPTED = 130
#: Exit code of a run whose files are not all there.
NOT_WRITTEN = 1
RESULTS = "results.json"
#: Options that change no number.
WITHOUT_EFFECT = ("out", "name", "resume")
_MAY_CHANGE = (*WITHOUT_EFFECT, "workers", "data_workers", "checkpoint_steps", "trackers")


def in_ranks(parser: argparse.ArgumentParser, run: Callable[[Ranks], int]) -> int:
    """Run a recipe that trains one model in as many processes as were started, and return the exit code."""
    with started_ranks() as state:
        try:
            return run(Ranks(state))
        except (RecipeError, SaliencyRegError) as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(
                "\nInterrupted. Run the same command with the --name of the run and --resume auto to go on from its latest "
                "checkpoint; there is one every --checkpoint-steps."
            )
            return INTERRUPTED


def open_folder(
    parser: argparse.ArgumentParser, options: argparse.Namespace, kind: tuple[str, int] | None = None
) -> Path:
    """The folder of a run, from its ``--out``, ``--name`` and, where there is one, ``--resume``.

    A run that is to go on has to be of this ``kind``: the recipe and the schema version.
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

        def opened() -> Path:
            folder = open_folder(parser, options, kind)
            try:
                held.enter_context(locked(folder))
            except BlockingIOError:
                parser.error(
                    f"argument --name: another run is at work in {folder} and holds {folder / LOCK}. Pass another --name, "
                    "or stop the other run."
                )
            except OSError as error:
                parser.error(
                    f"argument --name: cannot write in {folder} ({error.strerror}). Pass another --name or --out."
                )
            return folder

        yield ranks.by_main("open the folder of the run", opened)


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
