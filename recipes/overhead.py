"""What the regularizer and gradient surgery cost: step time and peak memory beside the plain step and other ways.

Times are process CPU times (all threads added up) of interleaved steps, compared step by step, so that a machine whose
speed drifts does not decide the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .benchmarks.collectives import collective_rows, collective_table
from .benchmarks.step_statistics import interval, median, ratio
from .benchmarks.steps import STEPS, make_steps
from .runs.command_line import whole_number
from .runtime.errors import need
from .runtime.files import machine, new_run_folder, now, versions, write_json

__all__ = ["main"]

SCHEMA_VERSION = 1
#: Up to this many tasks the published loop and surgery on the parameters are timed; beyond, a step takes minutes.
MOST_TASKS_OF_SLOW_STEPS = 10
FAST = ("regularizer", "floor", "surgery", "regularizer_surgery")
SLOW = ("loop", "parameters", "torchjd", "textbook")
LABELS = {
    "regularizer": "with the regularizer",
    "floor": "heads' double backward alone",
    "surgery": "PCGrad (feature)",
    "regularizer_surgery": "regularizer w/ PCGrad (feature)",
    "loop": "published loop",
    "parameters": "PCGrad (parameters)",
    "torchjd": "PCGrad (parameters), TorchJD",
    "textbook": "PCGrad (parameters), textbook",
}
#: Other shapes of model, and what is timed on them.
VARIANTS = {
    "heads_alone": ("no backbone", ("regularizer",)),
    "linear": ("Linear with T columns", ("surgery", "regularizer_surgery")),
    "two-layer": ("two layers with T columns", ("surgery",)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write results.json, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.processes > 1 and not (dist.is_available() and dist.is_gloo_available()):
        parser.error(
            "argument --processes: this build of torch has no gloo. Use --processes 1, or install another one."
        )
    for module in ("numpy", "tqdm", *["torchjd"] * (options.processes == 1)):
        need(module)
    torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        return _print_peak_memory(options)
    folder = new_run_folder(options.out, options.name)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "date": now(),
        "options": {key: value for key, value in vars(options).items() if key not in ("out", "memory_of")},
        "versions": versions(),
        "machine": machine(),
        "rows": rows,
    }
    measure, table = (_measure, _table) if options.processes == 1 else (collective_rows, collective_table)
    try:
        for tasks in options.tasks:
            rows += measure(tasks, _most(tasks, options), options)
            write_json(folder / "results.json", result)
    except KeyboardInterrupt:
        print("\nInterrupted; what follows is what was finished.")
    print(table(rows, options))
    print(f"\nWritten to {folder}: results.json")
    return 0


def _measure(tasks: int, most: int | None, options: argparse.Namespace) -> list[dict[str, Any]]:
    times = _interleaved(["plain", *FAST], tasks, most, options.steps, options)
    memory = {} if _no_memory(options) else {name: _peak_memory(name, tasks, options) for name in times}
    rows = [_row(name, tasks, most, times[name], times["plain"], times["floor"], memory) for name in FAST]
    variants = ["heads_alone"] if most is not None else ["linear", "two-layer"]
    for variant in variants:
        names = VARIANTS[variant][1]
        count = options.steps if variant == "heads_alone" else max(options.steps // 2, 1)
        other = _interleaved(["plain", *names], tasks, most, count, options, variant)
        rows += [_row(name, tasks, most, other[name], other["plain"], None, {}, variant) for name in names]
    if tasks <= MOST_TASKS_OF_SLOW_STEPS and options.slow_steps > 0:
        beside = _interleaved(["plain", "regularizer", *SLOW], tasks, most, options.slow_steps, options)
        if not _no_memory(options):
            memory.update({name: _peak_memory(name, tasks, options) for name in SLOW})
        slow = {name: _row(name, tasks, most, beside[name], beside["plain"], None, memory) for name in SLOW}
        own = [a - b for a, b in zip(beside["regularizer"], beside["plain"])]
        loop = [a - b for a, b in zip(beside["loop"], beside["plain"])]
        slow["loop"]["own_cost_over_regularizer"] = median(loop) / max(median(own), 1e-9)
        slow["parameters"]["ratio_to_torchjd"] = ratio(beside["parameters"], beside["torchjd"])
        rows += slow.values()
    return rows


def _most(tasks: int, options: argparse.Namespace) -> int | None:
    """How many tasks the regularizer samples; ``None``: it takes all."""
    most: int = options.max_tasks_per_step
    return most if tasks > most else None


def _no_memory(options: argparse.Namespace) -> bool:
    return bool(options.no_memory) or not Path("/proc/self/clear_refs").exists()


def _interleaved(
    names: Sequence[str],
    tasks: int,
    most: int | None,
    count: int,
    options: argparse.Namespace,
    variant: str | None = None,
) -> dict[str, list[float]]:
    """CPU seconds of ``count`` steps of each kind, one after the other in an order that turns."""
    from tqdm import tqdm

    steps = make_steps(names, tasks, options.batch_size, options.size, options.width, most, variant)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in tqdm(range(count + options.warmup), desc=f"{tasks} tasks", disable=None):
        for place in range(len(names)):
            name = names[(place + round_) % len(names)]
            before = time.process_time()
            steps[name]()
            if round_ >= options.warmup:
                seconds[name].append(time.process_time() - before)
    return seconds


def _row(
    name: str,
    tasks: int,
    most: int | None,
    seconds: Sequence[float],
    plain: Sequence[float],
    floor: Sequence[float] | None,
    memory: dict[str, float],
    variant: str | None = None,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "tasks": tasks,
        "max_tasks_per_step": most,
        "step": name,
        "variant": variant,
        "steps_counted": len(seconds),
        "median_seconds": median(seconds),
        "ratio_to_plain": ratio(seconds, plain),
    }
    if floor is not None and name.startswith("regularizer"):
        row["ratio_to_floor"] = ratio(seconds, floor)
    if memory:
        row["peak_memory_mib"] = memory[name]
        row["memory_ratio_to_plain"] = memory[name] / max(memory["plain"], 1.0)
    return row


def _peak_memory(name: str, tasks: int, options: argparse.Namespace) -> float:
    """MiB that a process of its own grew by, from its imports to the peak of some steps: weights, momentum, activations."""
    command = [sys.executable, "-m", "recipes.overhead", "--memory-of", name, "--tasks", str(tasks)]
    for option in ("batch_size", "size", "width", "threads", "max_tasks_per_step"):
        command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _print_peak_memory(options: argparse.Namespace) -> int:
    (tasks,) = options.tasks
    most = _most(tasks, options)
    before = _reset_peak()
    steps = make_steps([options.memory_of], tasks, options.batch_size, options.size, options.width, most)
    for _ in range(2 if options.memory_of in SLOW else 4):
        steps[options.memory_of]()
    print(json.dumps((_status("VmHWM") - before) / 1024))
    return 0


def _reset_peak() -> int:
    """Set the peak memory of this process to what it uses now, and return that in KiB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _table(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        f"ResNet-18 shape (width {options.width}) at {options.size}x{options.size}, batch {options.batch_size}, two-layer "
        f"heads, {options.threads} thread(s).",
        "CPU time of a step over that of the plain step next to it: median [95 % interval]; peak memory likewise.",
        f"{'tasks':>5}  {'step':<59}{'steps':>6}  {'time / plain':<24}{'time / floor':<24}{'memory / plain':>14}",
    ]
    for row in rows:
        label = LABELS[row["step"]]
        if row["variant"] is not None:
            label += f", {VARIANTS[row['variant']][0]}"
        if row["max_tasks_per_step"] is not None and row["step"] != "surgery":  # which weighs all tasks
            label += f", {row['max_tasks_per_step']} sampled"
        floor = interval(row["ratio_to_floor"]) if "ratio_to_floor" in row else ""
        memory = f"{row['memory_ratio_to_plain']:.3f}" if "memory_ratio_to_plain" in row else ""
        time_ratio = interval(row["ratio_to_plain"])
        lines.append(
            f"{row['tasks']:>5}  {label:<59}{row['steps_counted']:>6}  {time_ratio:<24}{floor:<24}{memory:>14}".rstrip()
        )
    for row in rows:
        if "own_cost_over_regularizer" in row:
            lines.append(
                f"With {row['tasks']} tasks the published loop adds {row['own_cost_over_regularizer']:.0f} times what the "
                "regularizer adds."
            )
        if "ratio_to_torchjd" in row:
            lines.append(
                f"With {row['tasks']} tasks PCGrad (parameters) takes {interval(row['ratio_to_torchjd'])} of the time of "
                "TorchJD."
            )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.overhead", description=__doc__)
    add = parser.add_argument
    add(
        "--tasks",
        type=whole_number(1),
        nargs="+",
        default=[3, 10, 40, 200],
        metavar="T",
        help="numbers of tasks (default: 3 10 40 200)",
    )
    add(
        "--processes",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="from 2 on: time the regularizer's collectives in N processes under DistributedDataParallel instead "
        "(default: 1)",
    )
    add("--steps", type=whole_number(1), default=100, metavar="N", help="counted steps of each kind (default: 100)")
    add("--warmup", type=whole_number(1), default=3, metavar="N", help="steps before that (default: 3)")
    add(
        "--slow-steps",
        type=whole_number(0),
        default=10,
        metavar="N",
        help="counted steps of the published loop and of surgery on the parameters, 0 for none (default: 10)",
    )
    add(
        "--max-tasks-per-step",
        type=whole_number(1),
        default=40,
        metavar="N",
        help="beyond so many tasks, a sample (default: 40)",
    )
    add("--batch-size", type=whole_number(1), default=32, metavar="N", help="images per step (default: 32)")
    add("--size", type=whole_number(1), default=64, metavar="N", help="side of the images (default: 64)")
    add(
        "--width",
        type=whole_number(1),
        default=64,
        metavar="N",
        help="channels of the first stage; 64 is ResNet-18 (default: 64)",
    )
    add("--threads", type=whole_number(1), default=1, metavar="N", help="of torch; one is the least noisy (default: 1)")
    add(
        "--no-memory",
        action="store_true",
        help="leave out the peak memory, which takes a process for each figure and Linux",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/overhead"),
        metavar="FOLDER",
        help="where runs go (default: runs/overhead)",
    )
    add("--name", default=None, metavar="NAME", help="of the run's folder (default: the present time)")
    add("--memory-of", choices=list(STEPS), default=None, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
