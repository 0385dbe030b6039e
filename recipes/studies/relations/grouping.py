"""Which groups, and how many: those on which several trainings agree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saliency_reg import GroupStability, group_stability, task_groups

Groups = tuple[tuple[str, ...], ...]
#: What it costs to have each label in a group of its own, in units of the separation of one group of all, at most 1: more
#: groups have to be worth it. With the cost of each group in the library, labels would be alone where views are noisy.
COST_OF_ALL = 1.5
#: More groups than this are not tried, if nobody asks for them.
_MOST_GROUPS = 12
#: Adjusted Rand indices that differ by less are equal.
_AS_STABLE = 0.05
#: Affinities that differ by less are equal but for rounding.
_EQUAL = 1e-6


def groups_of(
    affinity: Tensor, of_each: Sequence[Tensor], tasks: Sequence[str], number: int | None
) -> tuple[Groups, GroupStability | None]:
    """Spectral groups of the mean affinity of several trainings, and whether the single trainings have the same.

    Their number is the one on which the trainings agree best; among equals, and with one training among all, that of least
    cost: the separation of Lu et al. (CVPR 2017), and 1.5 (G - 1) / (T - 1) for G groups. Of several trainings it is at
    least 2, since none could disagree on one group, and at most (T + 1) / 2.

    Args:
        affinity: ``[T, T]``, of the mean; :func:`stretched`.
        of_each: of each training.
        tasks: names.
        number: of groups, if it is given.
    """
    if number is None and len(of_each) == 1:
        return task_groups(affinity, tasks, group_cost=COST_OF_ALL / (len(tasks) - 1)), None
    if number is None and float(affinity.min()) == 1:
        number = 1
    if number is not None:
        return task_groups(affinity, tasks, number), _stability(of_each, tasks, number)
    tried = [
        (task_groups(affinity, tasks, count), _stability(of_each, tasks, count))
        for count in range(2, min((len(tasks) + 1) // 2, _MOST_GROUPS) + 1)
    ]
    most = max(own.adjusted_rand for _, own in tried if own is not None)
    stable = [one for one in tried if one[1] is not None and one[1].adjusted_rand > most - _AS_STABLE]
    return min(stable, key=lambda one: cost_of(affinity, one[0], tasks))


def cost_of(affinity: Tensor, groups: Groups, tasks: Sequence[str]) -> float:
    """What groups cost: one minus the affinity of each label to the one that is farthest in its group, mean over the labels
    of each group and then over groups, and the cost of the groups."""
    places = [[list(tasks).index(task) for task in group] for group in groups]
    within = [float(affinity[own][:, own].amin(1).mean()) for own in places]
    return 1 - sum(within) / len(within) + COST_OF_ALL * (len(groups) - 1) / (len(tasks) - 1)


def stretched(affinity: Tensor) -> Tensor:
    """``[T, T]``: the farthest pair has 0, and the closest 1, so that a cost means the same in all views."""
    off = ~torch.eye(len(affinity), dtype=torch.bool)
    low, high = float(affinity[off].min()), float(affinity[off].max())
    if high - low < _EQUAL:
        return torch.ones_like(affinity)
    return torch.where(off, (affinity - low) / (high - low), 1.0)


def _stability(of_each: Sequence[Tensor], tasks: Sequence[str], number: int) -> GroupStability | None:
    if len(of_each) < 2:
        return None
    return group_stability([task_groups(own, tasks, number) for own in of_each], tasks)
