"""Does it work with every family of timm? Smallest model of each, random weights, small images, both ways.

python -m recipes.timm_sweep

For each module of timm that registers models: a multi-task model, and the unmodified classifier, each through a forward, the
penalty, surgery at the fork, a backward pass, an optimizer step, and saliency maps. Prints a table, writes results.json, and
ends with code 1 if fewer than 95 % of the families pass both ways.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .runs.command_line import folder_name
from .runtime.errors import need
from .runtime.files import machine, new_run_folder, now, versions, write_json
from .sweeps.runner import add_limits, check_names
from .sweeps.timm_families import families, passes, sweep, table

#: Of all families.
LEAST_SHARE = 0.95


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all, write the results, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.timm_sweep",
        description="The smallest model of every family of timm, through a training step with the regularizer, both ways.",
    )
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME", help="modules of timm (default: all)")
    add_limits(parser, "--processes", "model")
    parser.add_argument("--out", type=Path, default=Path("runs/timm_sweep"), metavar="FOLDER", help="of all sweeps")
    parser.add_argument("--name", type=folder_name, metavar="NAME", help="of this sweep (default: the present time)")
    options = parser.parse_args(arguments)
    known = families()
    check_names(parser, "--families", options.families, known, "timm has no family")
    try:
        folder = new_run_folder(options.out, options.name)
    except FileExistsError as error:
        parser.error(f"argument --name: {error} exists. Pass another name.")
    results = sweep(options.families or known, options.processes, options.seconds)
    passed = sum(map(passes, results.values()))
    share = passed / len(results)
    content = {
        "finished": now(),
        "machine": machine(),
        "versions": {**versions(), "timm": need("timm").__version__},
        "passed": passed,
        "families": len(results),
        "share": share,
        "results": results,
    }
    write_json(folder / "results.json", content)
    text = table(results)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{folder / 'results.json'}")
    return 0 if share >= LEAST_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
