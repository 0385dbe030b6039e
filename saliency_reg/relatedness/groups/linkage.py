"""Average linkage (UPGMA; Sokal and Michener 1958) of an affinity."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def average_linkage(affinity: Tensor) -> Tensor:
    """Return the tree of merges by the mean distance ``1 - affinity`` between clusters, ``[T - 1, 4]``.

    In the form of ``scipy.cluster.hierarchy.linkage``, which can draw it: per merge the numbers of the two clusters (tasks
    first, then merges), their distance, and how many tasks they have together. Of equal distances, the first pair.

    Args:
        affinity: ``[T, T]`` float64, symmetric, in [0, 1]; the diagonal plays no part.
    """
    size = len(affinity)
    distance = (1.0 - affinity).fill_diagonal_(math.inf)
    number, count = list(range(size)), [1] * size
    merges = []
    for merge in range(size - 1):
        low, high = divmod(int(distance.argmin()), size)  # the first of the least is above the diagonal
        together = count[low] + count[high]
        merges.append([*sorted((number[low], number[high])), float(distance[low, high]), together])
        mean = (count[low] * distance[low] + count[high] * distance[high]) / together
        distance[low], distance[:, low] = mean, mean
        distance[high], distance[:, high] = math.inf, math.inf
        distance[low, low] = math.inf
        number[low], count[low] = size + merge, together
    return torch.tensor(merges, dtype=torch.float64, device="cpu").reshape(-1, 4)


def cut(merges: Tensor, number: int) -> list[list[int]]:
    """Return the ``number`` groups that are left before the last merges, by their first task."""
    size = len(merges) + 1
    groups = {task: [task] for task in range(size)}
    for merge in range(size - number):
        low, high = int(merges[merge, 0]), int(merges[merge, 1])
        groups[size + merge] = sorted(groups.pop(low) + groups.pop(high))
    return sorted(groups.values())


def number_at(merges: Tensor, distance: float) -> int:
    """Return how many groups there are where clusters merge up to a distance."""
    return len(merges) + 1 - int((merges[:, 2] <= distance).sum())
