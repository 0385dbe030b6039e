"""Ablations in one page: what rule, distance, pooling, target, heads, tasks, sizes and missing labels change in the gain.

One factor at a time, on the digits of scikit-learn and on the schools of High School and Beyond: nothing is downloaded.
Every result goes into one file as soon as it is there, and is never computed again: stop the command whenever you like, and
run it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .studies.ablations.cells import train_ablated
from .studies.ablations.factors import FACTORS
from .studies.ablations.methods import METHODS
from .studies.ablations.picture import COMPARED, draw, panels_of, table_of
from .studies.ablations.settings import add_arguments, check, introduction, settings_of
from .studies.command import StudyCommand
from .studies.study import Study


def _no_place(options: argparse.Namespace) -> None:
    """The data are in packages; ``--data`` says which."""


def _draw(study: Study, folder: Path | None) -> str:
    panels = panels_of(study, [(data, factor) for data, factors in FACTORS.items() for factor in factors])
    if folder is not None:
        draw(panels, folder / "ablations.png")
    return f"### All factors\n\n{table_of(panels)}"


COMMAND = StudyCommand(
    name="ablations",
    description=__doc__,
    settings=settings_of,
    metrics=("auc", "accuracy", "nmse"),
    compared=COMPARED,
    train=train_ablated,
    place=_no_place,
    add_arguments=add_arguments,
    check=check,
    introduction=introduction,
    draw=_draw,
    methods=METHODS,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
