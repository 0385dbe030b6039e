"""The tables that the overhead recipes print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..runtime.tables import aligned
from .steps import TAG_EVERY

LABELS = {
    "regularizer": "with the regularizer",
    "floor": "heads' double backward alone",
    "surgery": "PCGrad (feature)",
    "regularizer_surgery": "regularizer w/ PCGrad (feature)",
    "views": "regularizer and five views of relations",
    "loop": "published loop",
    "parameters": "PCGrad (parameters)",
    "torchjd": "PCGrad (parameters), TorchJD",
    "textbook": "PCGrad (parameters), textbook",
}
VARIANT_LABELS = {
    "heads_alone": "no backbone",
    "linear": "Linear with T columns",
    "two-layer": "two layers with T columns",
}
COST_COLUMNS = "{:>5}  {:<59}{:>6}  {:<24}{:<24}{:>14}"


def cost_table(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> str:
    """Return the rows of :func:`~recipes.benchmarks.costs.cost_rows` as text."""
    lines = [
        f"ResNet-18 shape (width {options.width}) at {options.size}x{options.size}, batch {options.batch_size}, two-layer "
        f"heads, {options.threads} thread(s).",
        "CPU time of a step over that of the plain step next to it: median [95 % interval]; peak memory likewise.",
        COST_COLUMNS.format("tasks", "step", "steps", "time / plain", "time / floor", "memory / plain"),
    ]
    for row in rows:
        floor = _interval(row["ratio_to_floor"]) if "ratio_to_floor" in row else ""
        memory = f"{row['memory_ratio_to_plain']:.3f}" if "memory_ratio_to_plain" in row else ""
        cells = (row["tasks"], _label(row), row["steps_counted"], _interval(row["ratio_to_plain"]), floor, memory)
        lines.append(COST_COLUMNS.format(*cells).rstrip())
    for row in rows:
        if "own_cost_over_regularizer" in row:
            lines.append(
                f"With {row['tasks']} tasks the published loop adds {row['own_cost_over_regularizer']:.0f} times what the "
                "regularizer adds."
            )
        if "ratio_to_regularizer" in row:
            lines.append(
                f"With {row['tasks']} tasks the five views take {_interval(row['ratio_to_regularizer'])} of the time of the "
                f"step with the regularizer, TAG in every {TAG_EVERY}th step included."
            )
        if "ratio_to_torchjd" in row:
            lines.append(
                f"With {row['tasks']} tasks PCGrad (parameters) takes {_interval(row['ratio_to_torchjd'])} of the time of "
                "TorchJD."
            )
    return "\n".join(lines)


def collective_table(rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> str:
    """Return the rows of :func:`~recipes.benchmarks.collectives.collective_rows` as text."""
    cells = [[*COLLECTIVE_COLUMNS], *([cell(row) for cell in COLLECTIVE_COLUMNS.values()] for row in rows)]
    lines = [
        f"ResNet-18 shape (width {options.width}) at {options.size}x{options.size}, two-layer heads, in {options.processes} "
        "gloo processes under",
        f"DistributedDataParallel, each with a batch of {options.batch_size} and {options.threads} thread(s).",
        "Inside the regularizer's collectives: time from the last process coming to the last one leaving, and CPU time.",
        "Step with them over the step without (process_group='local') next to it, waiting included. Median [95 % interval].",
        aligned(cells, left=1),
    ]
    if rows:
        largest = max(row["share_of_plain"]["median"] for row in rows)
        lines.append(
            f"At most {100 * largest:.2f} % of a plain step's time is spent inside the regularizer's collectives."
        )
    return "\n".join(lines)


def markdown_table(columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of :func:`~recipes.benchmarks.integrations.time_kinds` as Markdown, after columns about the model."""
    formats = {**columns, "step": "{kind}", "seconds": "{median_seconds:.2f}"}
    lines = [[*formats, "time over the plain step"], ["---"] * (len(formats) + 1)]
    lines += [[*(text.format(**row) for text in formats.values()), _interval(row["ratio_to_plain"])] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _label(row: Mapping[str, Any]) -> str:
    label = LABELS[row["step"]]
    if row.get("variant") is not None:
        label += f", {VARIANT_LABELS[row['variant']]}"
    if row["max_tasks_per_step"] is not None and row["step"] != "surgery":  # which weighs all tasks
        label += f", {row['max_tasks_per_step']} sampled"
    return label


def _interval(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _percent(share: Mapping[str, float]) -> str:
    return f"{100 * share['median']:.2f} [{100 * share['low']:.2f}, {100 * share['high']:.2f}]"


COLLECTIVE_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "step": _label,
    "tasks": lambda row: str(row["tasks"]),
    "steps": lambda row: str(row["steps_counted"]),
    "calls": lambda row: str(row["collectives_per_step"]),
    "ms inside": lambda row: f"{1000 * row['median_seconds_in_collectives']:.2f}",
    "% of plain step": lambda row: _percent(row["share_of_plain"]),
    "% of this step": lambda row: _percent(row["share_of_step"]),
    "CPU % of plain step": lambda row: _percent(row["cpu_share_of_plain"]),
    "time / local": lambda row: _interval(row["ratio_to_local"]),
    "CPU time / local": lambda row: _interval(row["cpu_ratio_to_local"]),
}
