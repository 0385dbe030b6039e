"""Tables on SARCOS (7 tasks) and School (139 tasks): regression where every training row has the label of one task.

All heads see every row, since the saliency needs no label. Every result goes into one file as soon as it is there, and is
never computed again: stop the command whenever you like, and run it again to go on.
"""

from __future__ import annotations

import sys
from typing import Any

from .data.tabular import fingerprint
from .studies.command import StudyCommand
from .studies.study import Setting
from .studies.tabular_cells import train_tabular

_FULL_LABELS = ("hard_sharing", "srdml_uniform", "srdml_projected", "srdml", "pcgrad", "srdml+pcgrad")
_MISSING_LABELS = (*_FULL_LABELS[:4], "srdml_cosine", "srdml_sqchordal", *_FULL_LABELS[4:])
#: Raise it when the trainings behind the same values change: old results are then no longer found.
VERSION = 1
_GRIDS: dict[str, tuple[float, ...]] = {
    "weight decay": (0.0, 0.05, 0.5),
    "strength": (0.01, 0.03, 0.1),
    "strength, cosine": (0.01, 0.03, 0.1),
    "strength, sqchordal": (0.01, 0.03, 0.1),
}


def _setting(key: str, label: str, methods: tuple[str, ...], **own: Any) -> Setting:
    values = {
        "version": VERSION,
        "activation": "gelu",
        "width": 64,
        "head_width": 16,
        "learning_rate": 3e-3,
        "weight_decay": 0.05,
        "evaluations": 20,
        **own,
    }
    return Setting(key, label, values, methods, _GRIDS)


def _sarcos(rows: int) -> Setting:
    return _setting(
        f"sarcos-{rows}",
        f"SARCOS, {rows} rows for each of 7 torques",
        _MISSING_LABELS,
        data="sarcos",
        rows_per_task=rows,
        validation_rows=500,
        epochs=100,
        batch_size=35 if rows < 100 else 70,
    )


#: In the order in which they are trained.
SETTINGS = {
    setting.key: setting
    for setting in (
        _sarcos(30),
        _sarcos(100),
        _setting(
            "school",
            "School, 139 tasks",
            _FULL_LABELS,
            data="school",
            validation_share=0.2,
            epochs=8,
            batch_size=500,
        ),
    )
}


COMMAND = StudyCommand(
    name="tabular",
    description=__doc__,
    settings=SETTINGS,
    metrics=("nmse",),
    compared=("nmse",),
    data=(None, "folder that has the folders sarcos and school, with train.parquet and test.parquet each"),
    packages=("datasets",),
    fingerprint=fingerprint,
    train=train_tabular,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
