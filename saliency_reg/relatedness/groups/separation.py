"""How many branches, and which: the cost of Lu et al. (CVPR 2017, arXiv 1611.05377, section 4).

A *branch* is a set of tasks, given by their numbers; a group is a set of branches. Branching asks layer by layer; for
groups of tasks every branch is one task, and its affinity that of the tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import ConfigurationError, TaskError
from .checks import check_affinity
from .spectral import spectral_partitions


def branch_affinity(affinity: Tensor, branches: Sequence[Sequence[int]]) -> Tensor:
    """Return how close c branches are, ``[c, c]`` float64.

    ``(S + S') / 2`` of ``S(k, l) = mean_{i in k} min_{j in l} A(i, j)``, over the tasks of the branches.
    The diagonal is by the same formula: a branch of tasks that differ is below 1 to itself.

    Args:
        affinity: of the tasks, ``[T, T]``, symmetric, in [0, 1].
        branches: numbers of the tasks of each of c branches, each task in one.
    """
    matrix = check_affinity(affinity)
    everyone = sorted(task for branch in branches for task in branch)
    if any(not branch for branch in branches) or everyone != list(range(len(matrix))):
        raise TaskError(
            f"branches must have each of the {len(matrix)} tasks once, and none be empty; "
            f"found {[list(branch) for branch in branches]}."
        )
    # worst[i, l]: the affinity of task i to the task of branch l that is farthest from it
    worst = torch.stack([matrix[:, list(branch)].amin(dim=1) for branch in branches], dim=1)
    mean = torch.stack([worst[list(branch)].mean(dim=0) for branch in branches])
    return (mean + mean.T) / 2


def separation_cost(branch_affinity: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """Return ``L_s``, in [0, 1], small if the branches of each group are close to each other.

    The mean over groups of ``1 - mean_{k in group} min_{l in group} A_b(k, l)``; the least includes that of k to itself.

    Args:
        branch_affinity: ``[c, c]``, from :func:`branch_affinity`.
        groups: numbers of the branches of each group.
    """
    within = [float(branch_affinity[list(group)][:, list(group)].amin(dim=1).mean()) for group in groups]
    return 1.0 - sum(within) / len(within)


def choose_partition(
    branch_affinity: Tensor, *, branch_cost: float, separation_weight: float, largest: int, seed: int
) -> list[list[int]]:
    """Return the d groups of branches with the least cost ``(d - 1) branch_cost + separation_weight L_s``.

    For every d from 1 to ``largest`` the branches are clustered spectrally; of the partitions in which the restarts
    end, that of the smallest separation cost stands for d. Of equal costs, the fewest groups.

    Args:
        branch_affinity: ``[c, c]``, from :func:`branch_affinity`.
        branch_cost: of one more branch at this layer, ``L0 2^p`` in the paper, with p poolings above.
        separation_weight: ``alpha`` in the paper.
        largest: most groups, at least 1; more than c are never made.
        seed: of the clustering.

    Returns:
        The numbers of the branches of each group, groups by their first branch.
    """
    matrix = check_affinity(branch_affinity, what="branch_affinity")
    for name, value in (("branch_cost", branch_cost), ("separation_weight", separation_weight)):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"{name} must be 0 or a positive number, found {value!r}.")
    if largest < 1:
        raise ConfigurationError(f"largest must be at least 1, found {largest}.")
    return cheapest_partition(
        matrix,
        lambda number: closest_partition(matrix, number, seed=seed),
        branch_cost=branch_cost,
        separation_weight=separation_weight,
        largest=largest,
    )


def cheapest_partition(
    branch_affinity: Tensor,
    partition: Callable[[int], list[list[int]]],
    *,
    branch_cost: float,
    separation_weight: float,
    largest: int,
) -> list[list[int]]:
    """Return the cheapest of the partitions into 1 to ``largest`` groups; of equal costs, the fewest groups."""
    best, least = partition(1), math.inf
    for number in range(1, min(largest, len(branch_affinity)) + 1):
        groups = partition(number)
        cost = (number - 1) * branch_cost + separation_weight * separation_cost(branch_affinity, groups)
        if cost < least - 1e-12:  # not by rounding
            best, least = groups, cost
    return best


def closest_partition(branch_affinity: Tensor, number: int, *, seed: int) -> list[list[int]]:
    """Return, of the partitions into ``number`` groups that spectral clustering finds, the one of smallest separation."""
    size = len(branch_affinity)
    if number in (1, size):  # nothing to cluster
        return [[*range(size)]] if number == 1 else [[branch] for branch in range(size)]
    found = spectral_partitions(branch_affinity, number, seed=seed)
    return min(found, key=lambda groups: separation_cost(branch_affinity, groups))
