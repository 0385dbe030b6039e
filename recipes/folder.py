"""Images of your own, with a table (CSV or parquet) of their paths and label columns, of which some may be missing.

Columns of 0 and 1 are binary tasks, texts and whole numbers 0 to K-1 are classes, other numbers are regressions. A missing
label is masked in the losses; the saliency still uses the image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saliency_reg.integrations.timm import TimmMultiTaskModel

from .data.fingerprints import fingerprint_of
from .data.images.in_files import FileImages, readable
from .data.images.to_show import Picture, first_images
from .data.label_columns import check_columns, labels_of, without_constant_tasks
from .data.splits import SPLITS, check_no_image_twice, rows_by_chance, rows_by_column
from .data.task_kinds import TaskKind
from .runs import single_run
from .runs.command_line import Parser, real_number
from .runs.image_arguments import add_run_arguments
from .runs.single_run import Loaded
from .runtime.errors import DataError, need
from .training.train import Data

__all__ = ["main"]


@dataclass(frozen=True)
class _Table:
    paths: list[Path]
    kinds: dict[str, TaskKind]
    labels: Tensor
    """``[N, T]``, NaN where one is missing."""
    classes: dict[str, tuple[str, ...]]
    rows: dict[str, Tensor]
    """Of each split."""
    left_out: dict[str, str]
    skipped: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one model and return the exit code."""
    return single_run.main("folder", _parser(), _load, arguments)


def _load(options: argparse.Namespace) -> Loaded:
    table = _table(options)

    def split(name: str, transform: Any) -> FileImages:
        rows = table.rows[name]
        return FileImages([table.paths[row] for row in rows.tolist()], table.labels[rows], transform)

    def data(model: TimmMultiTaskModel) -> Data:
        plain = model.transforms(train=False)
        return Data(
            table.kinds,
            split("train", model.transforms(train=True)),
            split("validation", plain),
            split("test", plain),
        )

    def picture(model: TimmMultiTaskModel) -> Picture:
        return first_images(model, split("test", model.transforms(train=False)))

    known = (~torch.isnan(table.labels)).float().mean()
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in table.rows.items())
    return Loaded(
        table.kinds,
        data,
        picture,
        (
            f"{counts} images; {len(table.kinds)} tasks: "
            + ", ".join(f"{task} ({_described(kind)})" for task, kind in table.kinds.items())
            + f"; {100 * known:.0f} % of the labels are there.",
        ),
        {
            "fingerprint": fingerprint_of(
                table.labels, *table.rows.values(), texts=[str(path) for path in table.paths]
            ),
            "classes": {task: list(names) for task, names in table.classes.items()},
            "left_out": table.left_out,
            "skipped_images": table.skipped,
        },
    )


def _described(kind: TaskKind) -> str:
    return f"{kind.classes} classes" if kind.name == "classes" else kind.name


def _table(options: argparse.Namespace) -> _Table:
    frame = _read(Path(options.table))
    place = str(options.table)
    columns = [str(name) for name in frame.columns]
    frame.columns = columns
    check_columns([options.image_column], columns, place)
    others = [options.split_column] if options.split_column else []
    check_columns(others, columns, place)
    tasks = options.tasks or [name for name in columns if name not in (options.image_column, *others)]
    check_columns(tasks, columns, place)
    chosen = _kinds(options.kind, tasks)
    root = Path(options.images) if options.images else Path(options.table).parent
    paths = [root / str(path) for path in frame[options.image_column]]
    kept = readable(paths, options.check, options.strict)
    frame = frame.iloc[kept]
    found = {task: labels_of(task, frame[task].tolist(), chosen.get(task), options.missing_value) for task in tasks}
    _check_no_split(frame, tasks)
    images = [paths[index] for index in kept]
    if options.split_column:
        rows = rows_by_column(frame[options.split_column].tolist(), options.split_column, kept)
        check_no_image_twice(images, rows)
    else:
        rows = rows_by_chance(images, options.validation_share, options.test_share, options.seed)
    kinds, labels, left_out = without_constant_tasks(
        {task: kind for task, (kind, _, _) in found.items()},
        torch.stack([labels for _, labels, _ in found.values()], dim=1),
        rows["train"],
    )
    return _Table(
        images,
        kinds,
        labels,
        {task: names for task, (_, _, names) in found.items() if names and task in kinds},
        rows,
        left_out,
        len(paths) - len(kept),
    )


def _read(path: Path) -> Any:
    pandas = need("pandas")
    if not path.is_file():
        raise DataError(f"found no file {path}. Pass the path of a .csv or .parquet file.")
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet"):
        raise DataError(
            f"{path} ends in {kind or 'nothing'}, expected .csv, .tsv or .parquet. Save the table as one of them."
        )
    try:
        if kind == ".parquet":
            frame = pandas.read_parquet(path)
        else:
            # All as texts: pandas would take the path 001 for a number, and the class None for a missing label.
            separator = "\t" if kind == ".tsv" else ","
            frame = pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except Exception as error:  # of pandas and pyarrow: many kinds
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    if not len(frame):
        raise DataError(f"{path} has no rows. Choose another table.")
    return frame


def _check_no_split(frame: Any, tasks: Sequence[str]) -> None:
    names = {alias for aliases in SPLITS.values() for alias in aliases}
    for task in tasks:
        if {str(value).strip().lower() for value in frame[task].tolist()} <= names:
            raise DataError(
                f"column {task!r} says train, validation or test, and is no task. Use --split-column {task}, or name the "
                "label columns after --tasks."
            )


def _kinds(given: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        task, equals, kind = text.rpartition("=")
        if not equals or kind not in ("binary", "classes", "number"):
            raise DataError(f"found --kind {text}. Pass COLUMN=binary, COLUMN=classes or COLUMN=number.")
        check_columns([task], tasks, "the list of tasks")
        found[task] = kind
    return found


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m recipes.folder", description=__doc__)
    share = real_number(above_zero=True)
    data = parser.add_argument_group("data")
    data.add_argument("--table", required=True, metavar="FILE", help="CSV, TSV or parquet")
    data.add_argument("--images", metavar="FOLDER", help="that the paths begin in (default: the folder of the table)")
    data.add_argument("--image-column", default="image", metavar="NAME", help="of the paths (default: image)")
    data.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="label columns (default: all but those of paths and splits)",
    )
    data.add_argument(
        "--kind",
        nargs="+",
        default=[],
        metavar="COLUMN=KIND",
        help="binary, classes or number, where the values do not say it",
    )
    data.add_argument(
        "--missing-value",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="stands for a missing label, beside empty cells and NaN, such as -1",
    )
    data.add_argument("--split-column", metavar="NAME", help="with train, validation and test (default: random splits)")
    data.add_argument("--validation-share", type=share, default=0.15, metavar="X", help="of the rows (default: 0.15)")
    data.add_argument("--test-share", type=share, default=0.15, metavar="X", help="of the rows (default: 0.15)")
    data.add_argument(
        "--check",
        choices=("decode", "header", "none"),
        default="decode",
        help="how images are checked before the training (default: decode: each is read once)",
    )
    data.add_argument("--strict", action="store_true", help="stop at unreadable images; by default they are skipped")
    add_run_arguments(
        parser, "folder", backbone="resnet18", image_size=None, epochs=20, batch_size=32, learning_rate=3e-4
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
