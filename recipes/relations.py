"""Which labels belong together: five views of a few trainings, groups, and how far the trainings agree.

Hard sharing with a SaliencyRegularizer is trained on a table of labels of one's own, or on a data set that is known here.
Groups, pictures and tables of all views go into one page. The result of every training goes into one file as soon as it is
there, and is never computed again: stop the command whenever you like, and run it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from .runs.command_line import add_number
from .studies.command import StudyCommand
from .studies.comparison.data_sets.options import (
    add_data_arguments,
    check_data,
    data_set_at,
    fingerprint_of_place,
    place_of,
    setting_of,
    tasks_of,
)
from .studies.comparison.data_sets.own_data import OWN
from .studies.relations.cells import METHOD, ONE_METHOD, found_in_table, train_related
from .studies.relations.findings import DEFAULT_VIEW, SECOND_VIEW, VIEW_NAMES
from .studies.relations.report import RelationsReport
from .studies.study import Setting

#: Raise it when the trainings behind the same values change: old results are then no longer found.
VERSION = 1


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_arguments(parser, "a first look: short trainings; a minute for a table of hundreds of rows")
    groups = parser.add_argument_group("groups")
    text = f"that groups are made of (default: {DEFAULT_VIEW}, or {SECOND_VIEW} where only that is more than noise)"
    groups.add_argument("--view", choices=VIEW_NAMES, help=text)
    add_number(groups, "--groups", None, "how many (default: the number on which the trainings agree best)")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    check_data(parser, options)
    options.methods = None
    if options.quick and options.data != OWN and not any(own.startswith("epochs=") for own in options.changes):
        options.values["epochs"] = max(2, options.values["epochs"] // 3)
    tasks = tasks_of(options.values)
    if tasks < 3:
        parser.error(f"argument --tasks: found {tasks}. Between two labels there is one relation: name at least 3.")
    if options.groups is not None and options.groups > tasks:
        parser.error(f"argument --groups: found {options.groups}. There are {tasks} labels: pass at most as many.")


def _settings(options: argparse.Namespace) -> dict[str, Setting]:
    setting = setting_of(options, ONE_METHOD)
    values = {**setting.values, "watch_relations": True, "relations": VERSION}
    return {setting.key: replace(setting, values=values, methods=(METHOD.key,))}


def _introduction(options: argparse.Namespace) -> str:
    place, values = place_of(options), options.values
    problem = data_set_at(place).build(values, place.where, 0)
    sizes = [len(own) for own in (problem.train, problem.validation, problem.test)]
    said = f"{sizes[0]} training, {sizes[1]} validation and {sizes[2]} test samples; {len(problem.kinds)} labels."
    return "\n".join([*([found_in_table(place.where)] if place.data == OWN else []), said])


COMMAND = StudyCommand(
    name="relations",
    description=__doc__,
    settings=_settings,
    metrics=("score",),
    compared=(),
    train=train_related,
    place=place_of,
    fingerprint=fingerprint_of_place,
    packages=("pandas", "networkx"),
    add_arguments=_add_arguments,
    check=_check,
    introduction=_introduction,
    methods=ONE_METHOD,
    baseline="",
    seeds=3,
    report=lambda options: RelationsReport(options.view, options.groups),
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
