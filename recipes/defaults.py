"""How much of a tuned gain the defaults of the package keep, over all studies: reads their results, and trains nothing.

For each setting: the tuned baseline (hard sharing), the tuned SRDML method that validates best, and SRDML with nothing
tuned, with paired differences. On groups the latter has a third of the weight decay that hard sharing has chosen. Each
study has its results in a file: FOLDER/groups.jsonl, FOLDER/molecules.jsonl, ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cifar_grid, digits, go_emotions_grid, groups, molecules, synthetic, tabular
from .runtime.errors import RecipeError, need
from .runtime.files import write_text
from .studies.regret import Regret, Source
from .studies.regret_table import regret_table
from .studies.tables import LEGEND

_RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SOURCES = (
    Source(groups.COMMAND),
    Source(molecules.COMMAND),
    Source(tabular.COMMAND),
    Source(digits.COMMAND),
    Source(cifar_grid.COMMAND, title="CIFAR-10, "),
    Source(go_emotions_grid.COMMAND, title="GoEmotions, ", arguments=("--tuning-seeds", "1")),
    # The defaults are tried without a shared layer there: the same network without a penalty is single-task.
    Source(synthetic.COMMAND, baseline="single_task"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    need("optuna")
    names = [f"{source.command.name}.jsonl" for source in SOURCES]
    if not any((options.results / name).is_file() for name in names):
        parser.error(
            f"argument --results: {options.results} has no results of a study. Pass a folder with {', '.join(names)}, "
            "or some of them."
        )
    regret = Regret()
    try:
        for source, name in zip(SOURCES, names):
            regret.read(source, options.results / name)
    except RecipeError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    text = f"{regret_table(regret)}\n\n{LEGEND}"
    print(text)
    if options.out is not None:
        try:
            write_text(options.out, text + "\n")
        except OSError as error:
            parser.error(f"argument --out: cannot write {options.out} ({error.strerror}). Pass another file.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.defaults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "with the files of results, each with the name of its study (default: docs/results)"
    parser.add_argument("--results", type=Path, default=_RESULTS, metavar="FOLDER", help=text)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the same text as a file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
