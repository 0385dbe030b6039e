"""Does it work with every family of timm? Smallest model of each, random weights, small images, both ways.

python -m recipes.timm_sweep

For each module of timm that registers models: a multi-task model, and the unmodified classifier, each through a forward, the
penalty, surgery at the fork, a backward pass, an optimizer step, and saliency maps. Prints a table, writes results.json, and
ends with code 1 if fewer than 95 % of the families pass both ways.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from .runs.command_line import folder_name, whole_number
from .runtime.files import machine, new_run_folder, now, versions, write_json
from .runtime.tables import aligned
from .sweeps.checks import check_names
from .sweeps.timm_representatives import families, smallest_models

__all__ = ["main", "passes", "sweep", "table"]

#: Of all families.
LEAST_SHARE = 0.95
CLASSES = 3
#: What a child prints in front of its result.
_MARK = "result of timm_sweep: "
_COLUMNS = ("family", "model", "parameters", "image", "layout", "multi-task", "unmodified", "map", "seconds", "reason")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.model is not None:
        from .sweeps.timm_families import check_family

        print(_MARK + json.dumps(check_family(options.model)), flush=True)
        return 0
    known = families()
    check_names(parser, "--families", options.families, known, "timm has no family")
    try:
        folder = new_run_folder(options.out, options.name)
    except FileExistsError as error:
        parser.error(f"argument --name: {error} exists. Pass another name.")
    results = sweep(options.families or known, options.processes, options.seconds)
    passed = [family for family, result in results.items() if passes(result)]
    share = len(passed) / len(results)
    write_json(
        folder / "results.json",
        {
            "finished": now(),
            "machine": machine(),
            "versions": {**versions(), **_timm_version()},
            "passed": len(passed),
            "families": len(results),
            "share": share,
            "results": results,
        },
    )
    text = table(results)
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{folder / 'results.json'}")
    return 0 if share >= LEAST_SHARE else 1


def sweep(chosen: Sequence[str], processes: int, seconds: int) -> dict[str, dict[str, Any]]:
    """Results by family.

    Args:
        chosen: families.
        processes: children at a time.
        seconds: limit for each child.
    """
    print(f"smallest models of {len(chosen)} families", flush=True)
    found = smallest_models(chosen, CLASSES)
    results: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(processes) as pool:
        waiting = {
            pool.submit(_in_child, entry["model"], seconds): family
            for family, entry in found.items()
            if entry["model"] is not None
        }
        for number, future in enumerate(as_completed(waiting), start=1):
            family = waiting[future]
            results[family] = {**found[family], **future.result()}
            word = "ok" if passes(results[family]) else f"FAILED {results[family]['reasons']}"
            print(f"{number}/{len(waiting)} {family} {found[family]['model']}: {word}", flush=True)
    for family, entry in found.items():
        if entry["model"] is None:
            results[family] = {**entry, **_failed(entry["reason"])}
    return {family: results[family] for family in sorted(results)}


def passes(result: Mapping[str, Any]) -> bool:
    """Whether both ways work."""
    return bool(result["multi_task"] and result["unmodified"])


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per family, and totals."""
    rows = [list(_COLUMNS)]
    for family, result in results.items():
        parameters = result["parameters"]
        rows.append(
            [
                family,
                str(result["model"]),
                "-" if parameters is None else f"{parameters / 1e6:.2f}M",
                str(result["image_size"] or "-"),
                str(result["layout"] or "-"),
                *("ok" if result[way] else "FAILED" for way in ("multi_task", "unmodified", "unmodified_map")),
                f"{result['seconds']:.1f}",
                "; ".join(f"{way}: {reason}" for way, reason in result["reasons"].items()),
            ]
        )
    totals = [
        f"{name}: {sum(bool(result[way]) for result in results.values())} of {len(results)}"
        for name, way in (("multi-task", "multi_task"), ("unmodified", "unmodified"), ("at the map", "unmodified_map"))
    ]
    both = sum(map(passes, results.values()))
    totals.append(f"both ways: {both} of {len(results)} families ({100 * both / max(len(results), 1):.1f} %)")
    return aligned(rows, left=2) + "\n\n" + "\n".join(totals)


def _in_child(model: str, seconds: int) -> dict[str, Any]:
    """A crash or an endless loop of one model is not that of the sweep."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "recipes.timm_sweep", "--model", model]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=Path(__file__).parents[1]
        )
    except subprocess.TimeoutExpired:
        return _failed(f"not finished within {seconds} seconds", time.monotonic() - begun)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            result: dict[str, Any] = json.loads(line[len(_MARK) :])
            return result
    last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
    return _failed(f"the process ended with code {done.returncode}: {last}", time.monotonic() - begun)


def _failed(reason: str, seconds: float = 0.0) -> dict[str, Any]:
    ways = ("multi_task", "unmodified", "unmodified_map")
    return {
        "image_size": None,
        "layout": None,
        **dict.fromkeys(ways, False),
        "reasons": dict.fromkeys(ways[:2], reason),
        "notes": [],
        "seconds": seconds,
    }


def _timm_version() -> dict[str, str]:
    import timm

    return {"timm": timm.__version__}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.timm_sweep",
        description="The smallest model of every family of timm, through a training step with the regularizer, both ways.",
    )
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME", help="modules of timm (default: all)")
    parser.add_argument(
        "--processes", type=whole_number(1), default=2, metavar="N", help="models at a time (default: 2)"
    )
    parser.add_argument(
        "--seconds", type=whole_number(1), default=900, metavar="N", help="limit for each model (default: 900)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/timm_sweep"), metavar="FOLDER", help="of all sweeps")
    parser.add_argument("--name", type=folder_name, metavar="NAME", help="of this sweep (default: the present time)")
    parser.add_argument("--model", metavar="NAME", help=argparse.SUPPRESS)  # of a child: prints its result
    return parser


if __name__ == "__main__":
    sys.exit(main())
