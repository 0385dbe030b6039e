"""Options of a table of one's own: its columns, and what they are."""

from __future__ import annotations

import argparse
from typing import Any

from ....data.own_rows.rows import INPUTS, Columns

_OF_TABLE = (*INPUTS, "images", "tasks", "kind", "missing_value", "split_column", "checkpoint_path")


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    data: Any = parser.add_argument_group("data of your own")
    text = "CSV, TSV or parquet, in place of --data: a row for each sample, with columns of inputs and of labels"
    data.add_argument("--table", metavar="FILE", help=text)
    text = "column of the paths of images (default: the only one that has paths of images, if no input is named)"
    data.add_argument("--image", metavar="COLUMN", help=text)
    data.add_argument("--text", metavar="COLUMN", help="column of texts")
    text = "columns of numbers and categories; without names, all that are no --tasks"
    data.add_argument("--features", nargs="*", metavar="COLUMN", help=text)
    data.add_argument("--images", metavar="FOLDER", help="that the paths begin in (default: the folder of the table)")
    text = "label columns (default: all others, but those that look like no labels); empty cells are missing labels"
    data.add_argument("--tasks", nargs="+", default=[], metavar="COLUMN", help=text)
    text = "binary, classes or number, where the values do not say it"
    data.add_argument("--kind", nargs="+", default=[], metavar="COLUMN=KIND", help=text)
    text = "stands for a missing label, beside empty cells and NaN, such as -1"
    data.add_argument("--missing-value", nargs="+", default=[], metavar="TEXT", help=text)
    text = "with train, validation and test (default: drawn anew for each seed)"
    data.add_argument("--split-column", metavar="COLUMN", help=text)
    text = "begin with the weights of the --backbone in a file"
    data.add_argument("--checkpoint-path", metavar="FILE", help=text)


def check_table(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what does not go together."""
    if options.table is None:
        for name in _OF_TABLE:
            if getattr(options, name) not in (None, []) or (name == "features" and options.features is not None):
                parser.error(
                    f"argument --{name.replace('_', '-')}: of a --table of your own. Pass one, or leave it out."
                )
        return
    for name in ("data", "folder"):
        if getattr(options, name) is not None:
            parser.error(f"argument --{name}: --table stands in its place. Leave one of them out.")
    if options.pretrained and options.checkpoint_path is not None:
        parser.error("--pretrained and --checkpoint-path both name weights. Leave one of them out.")


def own_of(options: argparse.Namespace) -> Columns:
    """What the command line says of the table."""
    return Columns(
        table=options.table,
        image=options.image,
        text=options.text,
        features=None if options.features is None else tuple(options.features),
        images=options.images,
        tasks=tuple(options.tasks),
        kind=tuple(options.kind),
        missing_value=tuple(options.missing_value),
        split_column=options.split_column,
    )
