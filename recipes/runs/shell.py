"""One training from the command line to its folder: results.json, the saved model, a table and pictures.

What is trained is a :class:`SingleRun`; everything around it is here, once for texts and images.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from saliency_reg.errors import SaliencyRegError
from saliency_reg.integrations.plot import draw_relations, draw_task_tree

from ..runtime.errors import need
from ..runtime.files import finite, machine, now, versions, write_json
from ..runtime.processes import Ranks
from ..runtime.run_folder import NOT_WRITTEN, RESULTS, WITHOUT_EFFECT, in_ranks, open_shared_folder, results_in
from ..runtime.termination import TERMINATED, Terminated, listening
from ..training.checkpoints import Checkpoints
from ..training.train import PRETRAINING

SCHEMA_VERSION = 1
#: Folder of the checkpoints of a Trainer, within that of a run.
CHECKPOINTS = "checkpoints"
#: From the name of a picture to what draws it into a file.
Pictures = Mapping[str, Callable[[Path], object]]


class SingleRun(Protocol):
    """Data and model of one training, which has not begun yet.

    ``found`` are the figures that :meth:`train` has returned, or that an earlier start has written into ``results.json``.
    """

    @property
    def about(self) -> Sequence[str]:
        """Lines on what was found, for the beginning."""

    @property
    def data(self) -> Mapping[str, Any]:
        """Entries of ``results.json`` that tell the data from others: who goes on has to find the same ones."""

    @property
    def more(self) -> Mapping[str, Any]:
        """Further entries of ``results.json`` that are known from the beginning."""

    def train(self, folder: Path, resume: str) -> Mapping[str, Any]:
        """Train on every process, from the latest checkpoint of the folder with ``"auto"``, and return the figures."""

    def table(self, found: Mapping[str, Any]) -> str:
        """What is printed at the end."""

    def save(self, folder: Path) -> None:
        """Write the model."""

    def pictures(self, found: Mapping[str, Any], folder: Path) -> Pictures:
        """Those of the run in a folder, whose model may have been saved by an earlier start."""


def main(
    recipe: str,
    parser: argparse.ArgumentParser,
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None],
    load: Callable[[argparse.Namespace, Ranks], SingleRun],
    packages: Sequence[str],
    arguments: Sequence[str] | None = None,
) -> int:
    """Train one model, write everything into the folder of the run, and return the exit code.

    Args:
        recipe: its name.
        parser: of the options, among them those of :func:`~recipes.runs.command_line.add_folder`.
        check: refuses options that cannot go together, and fills in defaults that depend on others.
        load: reads the data and builds the model, on every process; what is wrong with them leaves no folder behind.
        packages: that have to be there.
        arguments: of the command line.
    """
    for package in packages:
        need(package)
    options = parser.parse_args(arguments)
    check(parser, options)
    return in_ranks(parser, lambda ranks: _run(recipe, parser, options, load(options, ranks), ranks))


def relation_pictures(found: Mapping[str, Any], tasks: Sequence[str], label: str) -> Pictures:
    """A heat map and a tree of the relations that a method has learned; nothing for methods without."""
    if found["relations"] is None:
        return {}
    # JSON has null for those of a training that diverged.
    weights = [[math.nan if weight is None else weight for weight in row] for row in found["relations"]]
    relations, title = torch.tensor(weights), f"Learned relations, {label}"
    return {
        "relations.png": lambda path: draw_relations(relations, tasks, path, title=title),
        "task_tree.png": lambda path: draw_task_tree(relations, tasks, path, title=title),
    }


def _run(
    recipe: str, parser: argparse.ArgumentParser, options: argparse.Namespace, run: SingleRun, ranks: Ranks
) -> int:
    started = time.monotonic()
    with listening(), open_shared_folder(parser, options, ranks, (recipe, SCHEMA_VERSION)) as folder:
        before = ranks.from_main(results_in(folder) if ranks.is_main else None)
        if before.get("status") == "complete":
            return _complete(folder, run, before, started) if ranks.is_main else 0
        data = _as_read(run.data)
        if any(before.get(name, value) != value for name, value in data.items()):
            parser.error(f"argument --resume: the run in {folder} was begun with other data. Pass another --name.")
        head = {
            "schema_version": SCHEMA_VERSION,
            "recipe": recipe,
            "date": before.get("date") or now(),
            "options": {name: value for name, value in vars(options).items() if name not in WITHOUT_EFFECT},
            "versions": versions(),
            "machine": machine(),
            "processes": ranks.size,
            **data,
            **run.more,
        }
        if ranks.is_main:
            print("\n".join(run.about), flush=True)
            write_json(folder / RESULTS, {**head, "status": "running"})
        try:
            found = run.train(folder, "never" if options.resume == "never" else "auto")
            if not ranks.is_main:
                return 0
            print(run.table(found), flush=True)  # first: a full disk may leave nothing else
            run.save(folder / "model")
            write_json(folder / RESULTS, {**head, "status": "complete", **found})
            _remove_checkpoints(folder)
            return _draw(folder, run.pictures(found, folder), started)
        except Terminated:
            if ranks.is_main:
                where = f"--out {folder.parent} --name {folder.name}"
                print(f"\nTerminated. To go on, run the same command with {where} --resume auto.", flush=True)
            return TERMINATED


def _complete(folder: Path, run: SingleRun, found: Mapping[str, Any], started: float) -> int:
    _remove_checkpoints(folder)
    code = 0
    pictures = run.pictures(found, folder)
    if any(not (folder / name).exists() for name in pictures):  # Ctrl-C or a full disk came while they were drawn
        code = _draw(folder, pictures, started)
    print(f"The run in {folder} is complete. Pass another --name to train again.")
    return code


def _draw(folder: Path, pictures: Pictures, started: float) -> int:
    """Draw those that are not there, say what was written, and return the exit code."""
    code = 0
    try:
        for name, draw in pictures.items():
            if not (folder / name).exists():
                _draw_whole(folder / name, draw)
    except (OSError, SaliencyRegError) as error:  # the training is worth more than its pictures
        print(f"Not all pictures were drawn: {error}")
        code = NOT_WRITTEN
    names = ", ".join(sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")))
    print(f"\n{time.monotonic() - started:.0f} s. Written to {folder}: {names}")
    return code


def _draw_whole(path: Path, draw: Callable[[Path], object]) -> None:
    """At once or not at all, so that a half drawn picture is not taken for a whole one."""
    hidden = path.with_name(f".{path.name}")
    try:
        draw(hidden)
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def _remove_checkpoints(folder: Path) -> None:
    for own in (folder, folder / PRETRAINING):
        Checkpoints(own).remove_all()
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _as_read(data: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back, where a tuple is a list."""
    read: dict[str, Any] = json.loads(json.dumps(finite(data)))
    return read
