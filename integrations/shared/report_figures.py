"""A report as plain numbers under names that all trackers take."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ... import RepMTLReport, SaliencyReport, SurgeryReport


def figures_of(report: SaliencyReport | RepMTLReport | SurgeryReport, max_pairs: int, prefix: str) -> dict[str, float]:
    """Return the finite figures of a step, and of the ``max_pairs`` pairs of tasks with the largest relations."""
    if isinstance(report, SurgeryReport):
        figures = _figures_of_surgery(report)
    elif isinstance(report, RepMTLReport):
        figures = {name: value for name, value in report.to_dict().items() if isinstance(value, float)}
    else:
        figures = _figures_of_relations(report, max_pairs)
        if report.surgery is not None:
            figures.update(_figures_of_surgery(report.surgery))
    return {f"{prefix}/{name}": value for name, value in figures.items() if math.isfinite(value)}


def _figures_of_relations(report: SaliencyReport, max_pairs: int) -> dict[str, float]:
    # To plain numbers at once: a device is waited for a few times, not for each pair.
    distances, relations = report.distances.tolist(), report.relations.tolist()
    size = len(report.tasks)
    pairs = [(i, j) for i in range(size) for j in range(i + 1, size) if not math.isnan(relations[i][j])]
    known = [distances[i][j] for i, j in pairs if math.isfinite(distances[i][j])]
    weights = [relations[i][j] for i, j in pairs] or [math.nan]
    figures = {
        "penalty": float(report.penalty),
        "strength": float(report.strength),
        "distance_mean": sum(known) / len(known) if known else math.nan,
        "relation_mean": sum(weights) / len(weights),
        "relation_max": max(weights),
        "relation_min": min(weights),
    }
    if (share := report.share) is not None:
        figures["share"] = share
    names = _pair_names(report.tasks, pairs)
    for i, j in sorted(pairs, key=lambda pair: -relations[pair[0]][pair[1]])[:max_pairs]:
        figures[f"distance/{names[i, j]}"] = distances[i][j]
        figures[f"relation/{names[i, j]}"] = relations[i][j]
    return figures


def _figures_of_surgery(report: SurgeryReport) -> dict[str, float]:
    weights = zip(_labels(report.tasks), report.weights.tolist())
    return {"surgery/conflicts": report.conflicts, **{f"surgery/weight/{task}": weight for task, weight in weights}}


def _pair_names(tasks: Sequence[str], pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], str]:
    labels = _labels(tasks)
    names = {(i, j): f"{labels[i]}-{labels[j]}" for i, j in pairs}
    if len(set(names.values())) < len(pairs):  # "a-b" and "c" beside "a" and "b-c"
        return {(i, j): f"{i}_{labels[i]}-{j}_{labels[j]}" for i, j in pairs}
    return names


def _labels(tasks: Sequence[str]) -> list[str]:
    """Return task names with characters that all trackers take; a slash would open another group of charts."""
    labels = [re.sub(r"[^\w.-]+", "_", task) for task in tasks]
    return labels if len(set(labels)) == len(tasks) else [f"{index}_{label}" for index, label in enumerate(labels)]
