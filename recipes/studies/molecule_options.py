"""Options of the study of molecules: its data, and what is the same for all methods."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..data.molecules import MoleculeTable
from ..runs.command_line import COUNT, NON_NEGATIVE, POSITIVE, add_number

#: Names of files, and for people.
PUBLISHED_DATA = {"tox21": "Tox21", "sider": "SIDER"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of data and training."""
    data = parser.add_argument_group("data")
    data.add_argument("--table", metavar="FILE", help="a CSV, TSV or parquet file of your own, in place of --data")
    data.add_argument("--smiles", default="smiles", metavar="NAME", help="its column of molecules (default: smiles)")
    text = "its columns of 0, 1 and empty cells (default: all that have nothing else)"
    data.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help=text)
    text = "stands for a missing label, beside empty cells, such as -1"
    data.add_argument("--missing-value", nargs="+", default=[], metavar="TEXT", help=text)
    text = "of each assay in training (default: those of the published tables; 50 for a --table)"
    data.add_argument("--labels", nargs="+", type=COUNT, metavar="N", help=text)
    text = "labels of a molecule: of one assay, or all it has, for so many molecules in all (default: one)"
    data.add_argument("--labelled", choices=("one", "all"), help=text)
    add_number(data, "--validation-share", 0.15, "of the molecules", POSITIVE)
    add_number(data, "--test-share", 0.2, "of the molecules", POSITIVE)
    add_number(data, "--bits", 1024, "of a fingerprint")
    steps = parser.add_argument_group("the same for all methods")
    add_number(steps, "--epochs", 30, "of 15 steps; the best one by validation AUC is kept")
    add_number(steps, "--learning-rate", 2e-3, "of AdamW", POSITIVE)
    for name, default, text in (
        ("--weight-decays", [0.0, 1.0, 10.0, 100.0], "of the heads: values tried for each method without a penalty"),
        ("--shares", [0.1, 0.3, 1.0, 3.0], "of the penalty in the losses: values tried for each SRDML method"),
    ):
        shown = f"{text} (default: {' '.join(f'{value:g}' for value in default)})"
        steps.add_argument(name, type=NON_NEGATIVE, nargs="+", default=default, metavar="X", help=shown)


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot go together."""
    if options.table and options.data:
        parser.error("argument --table: stands in place of --data. Leave one of them out.")
    if not options.table and (options.tasks or options.missing_value):
        parser.error("argument --tasks, --missing-value: of a --table of your own. Leave them out, or pass --table.")
    if len(options.shares) != len(options.weight_decays):
        parser.error(
            f"every method gets the same number of trials, but there are {len(options.weight_decays)} --weight-decays and "
            f"{len(options.shares)} --shares. Use as many of the one as of the other."
        )


def tables_of(options: argparse.Namespace) -> dict[str, MoleculeTable] | None:
    """The tables by name: the published data of a folder, or one of one's own; ``None`` without either."""
    if options.table:
        own = MoleculeTable(options.table, options.smiles, tuple(options.tasks), tuple(options.missing_value))
        return {"own": own}
    if options.data is None:
        return None
    return {name: MoleculeTable(str(Path(options.data, f"{name}.parquet"))) for name in PUBLISHED_DATA}
