"""Does it work with every architecture of transformers that is an encoder? Tiny models, random weights, both ways.

python -m recipes.transformers_sweep > docs/results/transformers_sweep.txt

For each: the unmodified classifier, and a multi-task model, each through a forward, the penalty, surgery at the fork, a
backward pass, an optimizer step, removal, and through its files: afterwards the same weights and the same logits. Prints a
table, and ends with code 1 if one fails that is not known to.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .runs.command_line import whole_number
from .runtime.errors import need
from .runtime.files import machine, now, versions
from .runtime.tables import aligned
from .runtime.workers import Workers
from .sweeps.checks import check_names
from .sweeps.tiny_models.registry import TINY_MODELS
from .sweeps.transformers_architectures import FAILED, NONE, OK, WAYS, check_architecture

__all__ = ["KNOWN", "as_known", "main", "passes", "table"]

#: Unmodified classifiers that are refused, with the error that does it.
KNOWN = {"swiftformer": "ClassifierNotFoundError"}
_COLUMNS = ("architecture", "modality", "unmodified", "multi-task", "loaded logits", "seconds", "classifier", "notes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all, print the table, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    check_names(parser, "ARCHITECTURE", options.architectures, TINY_MODELS, "there is no architecture")
    need("transformers")
    chosen = list(dict.fromkeys(options.architectures)) or list(TINY_MODELS)
    results: dict[str, dict[str, Any]] = {}
    begun = time.monotonic()
    with Workers(options.workers) as workers:
        for number, result in enumerate(workers.run_all(check_architecture, chosen, ordered=False), start=1):
            name = result["architecture"]
            results[name] = result
            words = ", ".join(f"{way.replace('_', '-')} {result[way]}" for way in WAYS)
            print(f"{number}/{len(chosen)} {name}: {words}", file=sys.stderr, flush=True)
    found = {**versions(), "transformers": need("transformers").__version__}
    used = ", ".join(f"{package} {found[package]}" for package in ("python", "torch", "transformers"))
    place = machine()
    print(f"python -m recipes.transformers_sweep, {now()[:10]}: {used}")
    print(f"{place['processor']}, {place['cores']} cores, {place['system']}; {time.monotonic() - begun:.0f} seconds\n")
    print(table({name: results[name] for name in chosen}))
    return 0 if all(map(as_known, results.values())) else 1


def passes(result: Mapping[str, Any]) -> bool:
    """Whether both ways work."""
    return all(result[way] == OK for way in WAYS)


def as_known(result: Mapping[str, Any]) -> bool:
    """Whether both ways work, or fail as they are known to."""
    reason = result["reasons"].get("unmodified", "")
    error = KNOWN.get(result["architecture"])
    unmodified = result["unmodified"] != FAILED or (error is not None and reason.startswith(error))
    return bool(unmodified and result["multi_task"] == OK)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per architecture, what does not work and why, and totals."""
    rows = [list(_COLUMNS)]
    reasons = []
    for name, result in results.items():
        rows.append(
            [
                name,
                result["modality"],
                *(result[way] for way in WAYS),
                _loaded(result["loaded"]),
                f"{result['seconds']:.1f}",
                result["classifier"] or "-",
                "; ".join(result["notes"]),
            ]
        )
        for way, reason in result["reasons"].items():
            reasons.append([f"{name}, {way.replace('_', '-')}", result[way], reason])
    every = list(results.values())
    with_classifier = [result for result in every if result["unmodified"] != NONE]
    unmodified = sum(result["unmodified"] == OK for result in every)
    multi_task = sum(result["multi_task"] == OK for result in every)
    totals = [
        f"unmodified: {unmodified} of {len(with_classifier)} that transformers has a classifier for",
        f"multi-task: {multi_task} of {len(every)}",
        f"{sum(map(passes, every))} of {len(every)} architectures both ways",
    ]
    parts = [aligned(rows, left=len(_COLUMNS)), "\n".join(totals)]
    if reasons:
        parts.insert(1, "What does not work:\n\n" + aligned(reasons, left=3))
    return "\n\n".join(parts)


def _loaded(differences: Mapping[str, float]) -> str:
    """Of the logits after loading: one word where both ways agree."""
    found = ["bit for bit" if each == 0 else f"to {each:.0e}" for each in differences.values()]
    return " / ".join(dict.fromkeys(found)) or "-"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.transformers_sweep",
        description="Tiny models of many architectures of transformers, through a training step with the regularizer, in "
        "both ways, and through their files.",
    )
    parser.add_argument(
        "architectures", nargs="*", metavar="ARCHITECTURE", help="such as bert vit wav2vec2 (default: all)"
    )
    parser.add_argument(
        "--workers", type=whole_number(1), default=2, metavar="N", help="architectures at a time (default: 2)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
