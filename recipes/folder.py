"""Images of your own, with a table (CSV or parquet) of their paths and label columns, of which some may be missing.

Columns of 0 and 1 (or yes and no) are binary tasks, texts and whole numbers 0 to K-1 are classes, other numbers are
regressions. A missing label is masked in the losses; the saliency still uses the image. ``python -m recipes.predict``
predicts with the model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .data.hub import fingerprint_of
from .data.images.in_files import FileImages
from .data.own_table import read_own_table
from .runs import single_run
from .runs.command_line import POSITIVE, Parser, add_choice, add_number
from .runs.image_arguments import add_run_arguments
from .runs.single_run import Loaded, loaded_images


def main(arguments: Sequence[str] | None = None) -> int:
    """Train one model and return the exit code."""
    return single_run.main("folder", _parser(), _load, arguments)


def _load(options: argparse.Namespace) -> Loaded:
    table = read_own_table(options)

    def split(name: str, transform: Callable[[Any], Tensor]) -> FileImages:
        rows = table.rows[name]
        return FileImages([table.paths[row] for row in rows.tolist()], table.labels[rows], transform)

    paths = [str(path) for path in table.paths]
    figures = {
        "fingerprint": fingerprint_of(table.labels, *table.rows.values(), texts=paths),
        "classes": {task: list(names) for task, names in table.classes.items()},
        "left_out": table.left_out,
        "skipped_images": table.skipped,
    }
    return loaded_images(table.kinds, split, table.about, figures)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m recipes.folder", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--table", required=True, metavar="FILE", help="CSV, TSV or parquet")
    data.add_argument("--images", metavar="FOLDER", help="that the paths begin in (default: the folder of the table)")
    data.add_argument("--image-column", default="image", metavar="NAME", help="of the paths (default: image)")
    text = "label columns (default: all but those of paths and splits, and those that look like no labels)"
    data.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help=text)
    text = "binary, classes or number, where the values do not say it"
    data.add_argument("--kind", nargs="+", default=[], metavar="COLUMN=KIND", help=text)
    text = "stands for a missing label, beside empty cells and NaN, such as -1"
    data.add_argument("--missing-value", nargs="+", default=[], metavar="TEXT", help=text)
    data.add_argument("--split-column", metavar="NAME", help="with train, validation and test (default: random splits)")
    add_number(data, "--validation-share", 0.15, "of the rows", POSITIVE)
    add_number(data, "--test-share", 0.15, "of the rows", POSITIVE)
    text = "how images are checked before the training; decode reads each once"
    add_choice(data, "--check", ("decode", "header", "none"), "decode", text)
    data.add_argument("--strict", action="store_true", help="stop at unreadable images; by default they are skipped")
    add_run_arguments(
        parser, "folder", backbone="resnet18", image_size=None, epochs=20, batch_size=32, learning_rate=3e-4
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
