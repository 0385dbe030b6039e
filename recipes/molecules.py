"""Properties of molecules with few labels each: Tox21 and SIDER, or a table of your own with a column of SMILES.

Inputs are count fingerprints of rdkit, and all methods train the same small network. Every result goes into one file as
soon as it is there, and is never computed again: stop the command whenever you like, and run it again to go on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .data.molecules import fingerprint
from .studies.command import StudyCommand
from .studies.gains import draw_gains
from .studies.molecule_cells import MOLECULE_METHODS, told, train_molecules
from .studies.molecule_options import PUBLISHED_DATA, add_arguments, check, tables_of
from .studies.pictures import draw_study
from .studies.study import Setting, Study

METHODS = (
    *("constant", "pooled", "single_task", "hard_sharing", "pcgrad@parameters", "srdml_uniform_cosine", "srdml"),
    *("srdml_sqeuclidean", "srdml_cosine", "srdml_sqchordal", "srdml_cosine+pcgrad@parameters", "srdml_default"),
)
#: Of the published tables: data, labels, and how many of them a molecule has.
PUBLISHED = (("tox21", 50, "one"), ("tox21", 150, "one"), ("sider", 25, "one"), ("sider", 100, "all"))
_IN_CELLS = ("bits", "validation_share", "test_share", "epochs", "learning_rate")


def _settings(options: argparse.Namespace) -> dict[str, Setting]:
    chosen: Sequence[tuple[str, int, str]] = PUBLISHED
    if options.table or options.labels or options.labelled:
        data = ["own"] if options.table else list(PUBLISHED_DATA)
        chosen = [(name, own, options.labelled or "one") for name in data for own in options.labels or (50,)]
    settings = [_setting(options, *own) for own in chosen]
    return {setting.key: setting for setting in settings}


def _setting(options: argparse.Namespace, data: str, labels: int, labelled: str) -> Setting:
    values = {name: getattr(options, name) for name in _IN_CELLS} | {
        "version": 1,
        "data": data,
        "labels": labels,
        "labelled": labelled,
        "steps_of_epoch": 15,
        "widths": [128, 64],
        "activation": "gelu",
        "penalty": "share",
        "temperature": 1.0,
    }
    what = "labels per assay" if labelled == "one" else "molecules with all labels"
    name = Path(options.table).stem if data == "own" else PUBLISHED_DATA[data]
    key = f"{data}-{labels}{'' if labelled == 'one' else '-all'}"
    spaces = {
        "constant": (0.0,),
        "weight decay": tuple(options.weight_decays),
        "share": tuple(options.shares),
    }
    return Setting(key, f"{name}, {labels} {what}", values, METHODS, spaces, decay_of_baseline=True)


def _introduction(options: argparse.Namespace) -> str:
    settings = [own for own in _settings(options).values() if own.key in (options.settings or (own.key,))]
    return told(settings, tables_of(options) or {})


def _draw(study: Study, folder: Path | None) -> str:
    if folder is not None:
        text = "AUC above hard sharing with the same seed (percentage points), and its 95 % interval"
        draw_gains(study, folder / "gains.png", "auc", text, leave_out=("constant", "single_task"))
    return draw_study(study, folder)


COMMAND = StudyCommand(
    name="molecules",
    description=__doc__,
    settings=_settings,
    metrics=("auc", "auc_learnable"),
    compared=("auc",),
    train=train_molecules,
    data=(None, "folder that has tox21.parquet and sider.parquet; or pass a --table"),
    place=tables_of,
    fingerprint=fingerprint,
    packages=("rdkit", "pandas", "matplotlib"),
    add_arguments=add_arguments,
    check=check,
    introduction=_introduction,
    draw=_draw,
    methods=MOLECULE_METHODS,
    architectures=("hard_sharing", "single_task"),
    seeds=10,
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(main())
