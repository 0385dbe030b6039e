"""The closest pairs of a view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .affinity import closeness_of
from .kinds import ViewKind


@dataclass(frozen=True)
class ClosePair:
    """Two tasks of a view.

    Attributes:
        task, other: their names, in the order of the tasks.
        value: what the view says of them; of a view that is not symmetric the mean of both directions.
        common_labels: samples that have labels of both.
        low, high: between these is the central share ``level`` of the values over the parts of the trajectory; ``None``
            with fewer than two of them.
    """

    task: str
    other: str
    value: float
    common_labels: int
    low: float | None
    high: float | None


def closest_pairs_of(
    kind: ViewKind,
    matrix: Tensor,
    trajectory: Tensor | None,
    common_labels: Tensor,
    tasks: Sequence[str],
    count: int,
    level: float,
) -> list[ClosePair]:
    """Return at most ``count`` pairs that ``[T, T]`` knows, the closest first; of ties the first in task order."""
    row, column = torch.triu_indices(len(tasks), len(tasks), 1)
    values = closeness_of(kind, matrix)[row, column]
    order = torch.argsort(-values, stable=True)  # NaN is last
    sign = -1.0 if kind.closer == "smaller" else 1.0
    found = []
    for place in order[: min(count, int((~values.isnan()).sum()))].tolist():
        i, j = int(row[place]), int(column[place])
        low = high = None
        if trajectory is not None:
            parts = (trajectory[:, i, j] + trajectory[:, j, i]) / 2
            parts = parts[~parts.isnan()]
            if len(parts) > 1:
                low, high = torch.quantile(parts, parts.new_tensor([(1 - level) / 2, (1 + level) / 2])).tolist()
        # Adding 0 turns the -0 of a turned sign into 0.
        value = sign * float(values[place]) + 0.0
        found.append(ClosePair(tasks[i], tasks[j], value, int(common_labels[i, j]), low, high))
    return found
