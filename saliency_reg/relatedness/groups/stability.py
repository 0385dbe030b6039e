"""Whether groupings of several seeds agree."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ...errors import TaskError
from .checks import check_grouping


@dataclass(frozen=True)
class GroupStability:
    """How well groupings agree.

    Attributes:
        tasks: their names, T of them.
        adjusted_rand: mean over pairs of groupings of the adjusted Rand index: 1 if all are equal, 0 as by chance.
        together: ``[T, T]`` float64, the share of groupings in which two tasks have a group in common; the diagonal is 1.
    """

    tasks: tuple[str, ...]
    adjusted_rand: float
    together: Tensor


def group_stability(
    groupings: Iterable[Iterable[Collection[str]]], tasks: Sequence[str] | None = None
) -> GroupStability:
    """Return how well groupings of several seeds, checkpoints or views agree.

    The adjusted Rand index (Hubert and Arabie 1985) is Cohen's kappa of "the two tasks are together", over pairs of tasks
    (Warrens 2008); so it is defined for overlapping groups, too. Two groupings that both put all tasks together, or all
    apart, agree with 1.

    Args:
        groupings: at least two, of the same tasks; from :func:`task_groups`, or ``.groups`` of :func:`best_groups`.
        tasks: the order of rows and columns; by default, that in which the first grouping names them.

    Raises:
        TaskError: fewer than two groupings, or one that does not have all tasks and only these.

    >>> from saliency_reg import group_stability
    >>> found = group_stability([[("a", "b"), ("c", "d")], [("a", "b"), ("c", "d")], [("a", "b", "c"), ("d",)]])
    >>> round(found.adjusted_rand, 3), found.together[1, 2].item()
    (0.333, 0.3333333333333333)
    """
    every = [list(grouping) for grouping in groupings]
    if len(every) < 2:
        raise TaskError(f"found {len(every)} grouping(s); whether groupings agree needs at least 2, one per seed.")
    names = list(tasks) if tasks is not None else list(dict.fromkeys(name for group in every[0] for name in group))
    together = torch.zeros(len(every), len(names), len(names), dtype=torch.bool, device="cpu")
    for index, grouping in enumerate(every):
        for group in check_grouping(grouping, names, overlap=True):
            places = torch.tensor([names.index(name) for name in group], device="cpu")
            together[index, places.unsqueeze(1), places] = True
    rows, columns = torch.triu_indices(len(names), len(names), offset=1, device="cpu")
    pairs = together[:, rows, columns]
    agreement = [_adjusted_rand(first, second) for first, second in combinations(pairs, 2)]
    return GroupStability(
        tasks=tuple(names),
        adjusted_rand=sum(agreement) / len(agreement),
        together=together.to(torch.float64).mean(dim=0),
    )


def _adjusted_rand(first: Tensor, second: Tensor) -> float:
    """Return the index from whether each pair of tasks is together in one grouping and in the other."""
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    if only_first == only_second == 0:
        return 1.0
    chance = (both + only_first) * (only_first + neither) + (both + only_second) * (only_second + neither)
    return 2.0 * (both * neither - only_first * only_second) / chance
