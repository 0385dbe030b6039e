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
from collections.abc import Sequence
from typing import Any

from .runtime.errors import need
from .runtime.files import machine, now, versions
from .sweeps.runner import add_limits, check_names, run_all
from .sweeps.tiny_models.registry import TINY_MODELS
from .sweeps.transformers_architectures import WAYS, as_known, check_architecture, failed, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.transformers_sweep",
        description="Tiny models of many architectures of transformers, through a training step with the regularizer, in "
        "both ways, and through their files.",
    )
    parser.add_argument(
        "architectures", nargs="*", metavar="ARCHITECTURE", help="such as bert vit wav2vec2 (default: all)"
    )
    add_limits(parser, "--workers", "architecture")
    options = parser.parse_args(arguments)
    check_names(parser, "ARCHITECTURE", options.architectures, TINY_MODELS, "there is no architecture")
    found = {**versions(), "transformers": need("transformers").__version__}
    chosen = list(dict.fromkeys(options.architectures)) or list(TINY_MODELS)
    results: dict[str, dict[str, Any]] = {}
    begun = time.monotonic()
    every = run_all(check_architecture, failed, chosen, options.processes, options.seconds)
    for number, (name, result) in enumerate(every, start=1):
        results[name] = result
        words = ", ".join(f"{way.replace('_', '-')} {result[way]}" for way in WAYS)
        print(f"{number}/{len(chosen)} {name}: {words}", file=sys.stderr, flush=True)
    used = ", ".join(f"{package} {found[package]}" for package in ("python", "torch", "transformers"))
    place = machine()
    print(f"python -m recipes.transformers_sweep, {now()[:10]}: {used}")
    print(f"{place['processor']}, {place['cores']} cores, {place['system']}; {time.monotonic() - begun:.0f} seconds\n")
    print(table({name: results[name] for name in chosen}))
    return 0 if all(map(as_known, results.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
