"""The peak memory of training steps, each kind in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from .steps import SLOW, make_steps

#: Linux resets the peak of a process that writes here.
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_memory(names: Iterable[str], tasks: int, options: argparse.Namespace) -> dict[str, float]:
    """Return MiB by kind of step, measured by processes of this recipe; nothing with ``--no-memory``, or without Linux."""
    if options.no_memory or not CLEAR_REFS.exists():
        return {}
    command = [sys.executable, "-m", "recipes.overhead", "--tasks", str(tasks)]
    for option in ("batch_size", "size", "width", "threads", "max_tasks_per_step"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    found = {}
    for name in names:
        done = subprocess.run([*command, "--memory-of", name], capture_output=True, text=True, check=True)
        found[name] = float(json.loads(done.stdout.splitlines()[-1]))
    return found


def print_peak_memory(options: argparse.Namespace) -> None:
    """Print the MiB that this process grows by, up to the peak of some steps: weights, momentum and activations."""
    (tasks,) = options.tasks
    CLEAR_REFS.write_text("5")
    before = _kibibytes("VmRSS")
    step = make_steps([options.memory_of], tasks, options)[options.memory_of]
    for _ in range(2 if options.memory_of in SLOW else 4):
        step()
    print(json.dumps((_kibibytes("VmHWM") - before) / 1024))


def _kibibytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
