"""Tables of the study of groups: which rows, and how many of each group."""

from __future__ import annotations

import argparse
from pathlib import Path

from ...data.groups import LEAST_TEST_ROWS, SOURCES, file_digest, kept_groups
from ...runtime.errors import DataError, OptionError
from ..study import Setting
from .fits import Place
from .methods import METHODS, SPACES

#: Raise it when the trainings behind the same values change: old results are then no longer found.
VERSION = 1
#: Heads that are tied need less weight decay: under Adam a strong one shrinks what ties cannot hold, the mean of all heads.
#: Of hard sharing's choice, a third of it, and less, on validation and seeds that are not reported.
DECAY_FACTOR = 1 / 3
#: Training rows of each group to rows of validation.
ROWS = {5: 3, 10: 3, 20: 5, 50: 12}
_ALL = tuple(METHODS)
_FEW = (
    *("constant", "single_task", "hard_sharing", "pooled", "mixed_model"),
    *("srdml_uniform", "srdml", "srdml_default"),
)
#: Table, rows and methods, in the order in which they are trained. In bdf hardly any school has more pupils.
_KNOWN = (
    *(("hsb82", 20, _ALL), ("exam", 20, _ALL), ("school", 20, _ALL), ("bdf", 10, _ALL)),
    *(("hsb82", 10, _ALL), ("exam", 10, _ALL), ("school", 10, _ALL)),
    *(("bdf", 5, _FEW), ("hsb82", 5, _FEW), ("exam", 5, _FEW), ("exam", 50, _FEW), ("school", 50, _FEW)),
    *(("egsingle", 10, _FEW), ("egsingle", 20, _FEW), ("chem97", 10, _FEW), ("chem97", 20, _FEW)),
)


def settings_of(options: argparse.Namespace) -> dict[str, Setting]:
    """Those of a command line: of all known tables, or of one's own.

    Raises:
        DataError: it cannot be read.
    """
    if options.table is not None:
        own = {
            "table": file_digest(options.table),
            "group": options.group,
            "target": options.target,
            "inputs": list(options.inputs),
        }
        name = Path(options.table).stem
        found = [_setting(name, name, rows, _ALL, **own) for rows in options.rows]
    else:
        # What is there can be printed without the files.
        files = options.data is not None or options.minutes == 0
        known = [entry for entry in _KNOWN if entry[0] != "school" or files]
        found = [_setting(name, SOURCES[name].label, rows, methods) for name, rows, methods in known]
    return {setting.key: setting for setting in found}


def _setting(data: str, label: str, rows: int, methods: tuple[str, ...], **own: object) -> Setting:
    values = {
        "version": VERSION,
        "data": data,
        **own,
        "rows": rows,
        "validation_rows": _validation_rows(rows),
        "width": 32,
        "epochs": 60,
        "steps_per_epoch": 5,
        "learning_rate": 5e-3,
        "decay": "constant",
        "decayed": "heads",
        "penalty": "share",
        "temperature": 1.0,
    }
    title = f"{label}, {rows} rows of each group"
    return Setting(f"{data}-{rows}", title, values, methods, SPACES, decay_of_baseline=True, decay_factor=DECAY_FACTOR)


def _validation_rows(rows: int) -> int:
    return ROWS.get(rows, max(3, rows // 4))


def place_of(options: argparse.Namespace) -> Place:
    """Where the rows are, from the command line."""
    return Place(options.data, options.table, options.group or "", options.target or "", tuple(options.inputs))


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse columns without a table, a table without columns, and rows that cannot be read."""
    own = {"group": options.group, "target": options.target, "inputs": options.inputs, "rows": options.rows}
    if options.table is None:
        for name, value in own.items():
            if value:
                parser.error(f"argument --{name}: of a table of one's own. Add --table FILE, or leave it out.")
        asked = any(key.startswith("school-") for key in options.settings or ())
        if asked and options.data is None and options.minutes != 0:
            parser.error(
                "argument --settings: school is in files. Add --data with the folder that has the folder school."
            )
        return
    options.rows = options.rows or list(ROWS)[:3]
    for name in ("group", "target"):
        if not own[name]:
            parser.error(f"argument --{name}: needed with --table. Use the name of a column.")
    if options.data is not None:
        parser.error("argument --data: the folder of a known table, and --table is one's own. Leave one of them out.")
    try:
        table = place_of(options).read("")
    except DataError as error:
        parser.error(f"argument --table: {error}")
    for rows in options.rows:
        if len(kept_groups(table, rows + _validation_rows(rows))) < 2:
            parser.error(
                f"argument --rows: fewer than two groups have {rows} training, {_validation_rows(rows)} validation and "
                f"{LEAST_TEST_ROWS} test rows. Use fewer rows."
            )


def introduction(options: argparse.Namespace) -> str:
    """What is the same for all methods, and how many groups there are in each table."""
    lines = [
        "Groups: a task for each; all methods learn from as many rows of each group, have some of each for validation, and",
        "are tested on all others. Networks: one hidden layer of 32 GELU units and a linear column for each group, AdamW at",
        "0.005, 60 epochs, the best one by validation. Weight decay acts on heads; methods with a penalty have a",
        "third of what hard sharing has chosen. Each method that tunes a value tries six, on seeds that are not reported.",
    ]
    for key, setting in settings_of(options).items():
        if options.settings and key not in options.settings:
            continue
        try:
            table = place_of(options).read(setting.values["data"])
        except (DataError, OptionError) as error:
            lines.append(f"{key}: {error}")
            continue
        kept = kept_groups(table, setting.values["rows"] + setting.values["validation_rows"])
        constant = f"; the same in all rows: {', '.join(table.left_out)}" if table.left_out else ""
        lines.append(
            f"{key}: {len(kept)} of {len(table.names)} groups have rows enough; {len(table.inputs)} inputs{constant}"
        )
    return "\n".join(lines)
