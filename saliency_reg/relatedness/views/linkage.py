"""Average linkage, and the order of the tasks along its tree, in torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

#: Two groups (tasks first, then former merges, each with its number), and the mean closeness of the pairs across them.
Merge = tuple[int, int, float]
#: Digits of a closeness in [0, 1] that count: the last ones of equal means may differ.
_DIGITS = 9


def average_linkage(closeness: Tensor) -> tuple[list[Merge], list[int]]:
    """Merge the two closest groups until one is left; return the merges, and an order of the tasks with groups together.

    Groups are as close as their pairs are on average (UPGMA). Where two groups are joined, each is turned so that the closer
    ends meet. Ties are decided by the given order, and of an order and its reverse the one is taken that begins with the
    smaller number.

    Args:
        closeness: ``[T, T]``, symmetric, without NaN, in ``[0, 1]``.

    Example:
        >>> close = torch.tensor([[1, 0.2, 0.9, 0.4], [0.2, 1, 0.1, 0.8], [0.9, 0.1, 1, 0.3], [0.4, 0.8, 0.3, 1]])
        >>> merges, order = average_linkage(close)
        >>> [(first, second, round(height, 3)) for first, second, height in merges], order
        ([(0, 2, 0.9), (1, 3, 0.8), (4, 5, 0.25)], [1, 3, 0, 2])
    """
    count = len(closeness)
    between = closeness.double().round(decimals=_DIGITS)
    between.fill_diagonal_(-torch.inf)
    ends = between.clone()
    sizes = torch.ones(count, dtype=torch.float64)
    numbers, orders = list(range(count)), [[task] for task in range(count)]
    merges: list[Merge] = []
    for step in range(count - 1):
        first, second = divmod(int(between.argmax()), count)  # the first of equal ones: first < second
        merges.append((numbers[first], numbers[second], float(between[first, second])))
        mean = (sizes[first] * between[first] + sizes[second] * between[second]) / (sizes[first] + sizes[second])
        mean = mean.round(decimals=_DIGITS)
        mean[first] = -torch.inf
        between[first] = between[:, first] = mean
        between[second] = between[:, second] = -torch.inf
        sizes[first] += sizes[second]
        orders[first] = _joined(orders[first], orders[second], ends)
        numbers[first] = count + step
    order = orders[0]
    return merges, order if order[0] <= order[-1] else order[::-1]


def _joined(left: list[int], right: list[int], closeness: Tensor) -> list[int]:
    ways = [(one, other) for one in (left, left[::-1]) for other in (right, right[::-1])]
    one, other = max(ways, key=lambda way: float(closeness[way[0][-1], way[1][0]]))
    return [*one, *other]
