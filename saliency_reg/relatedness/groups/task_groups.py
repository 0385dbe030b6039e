"""Groups of any number of tasks, each task in one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ...errors import ConfigurationError
from .checks import check_affinity, check_number, names_for, square
from .linkage import average_linkage, cut, number_at
from .separation import cheapest_partition, choose_partition
from .spectral import spectral_partitions

#: Lu et al. search with a cost per branch of 1/64 to 32/64 by depth (the median is 4/64) and weigh the separation by 2.
GROUP_COST = 1 / 32


def task_groups(
    affinity: Tensor,
    tasks: Sequence[str] | None = None,
    groups: int | None = None,
    *,
    method: str = "spectral",
    group_cost: float | None = None,
    distance: float | None = None,
    seed: int = 0,
) -> tuple[tuple[str, ...], ...]:
    """Return which tasks belong together, each in one group.

    Without ``groups`` their number is that of least cost ``(d - 1) group_cost + L_s`` (Lu et al., CVPR 2017): ``L_s`` is the
    mean over groups of one minus the affinity of their tasks to the one that is farthest, in [0, 1]. The more a group
    costs, the fewer there are. As there, the spectral partition that stands for a number is then, of those in which k-means
    ends, the one of least ``L_s``; with ``groups`` it is the one of least inertia, as usual.

    Args:
        affinity: ``[T, T]``, symmetric, in [0, 1], larger for closer tasks; ``views.affinity(name)`` makes one of any view.
        tasks: their names; their numbers if left out.
        groups: how many, from 1 to T.
        method: ``"spectral"`` (normalised, k-means from 100 starts) or ``"average"`` (linkage on ``1 - affinity``).
        group_cost: what each further group costs; 1/32 by default, the median of the published costs.
        distance: for ``"average"``, instead of a number: tasks are together up to this mean distance.
        seed: of the starts of k-means; average linkage draws nothing.

    Returns:
        The names of each group in the order of the tasks, groups by their first task.

    Raises:
        ConfigurationError: an affinity that is not symmetric or not in [0, 1]; a number of groups out of range; an unknown
            method; options that exclude each other.
        NonFiniteError: NaN in the affinity; the message names the pairs.
        ShapeError: the affinity is not square.
        TaskError: fewer than three tasks, or names that are not unique or not one per row.

    >>> import torch
    >>> from saliency_reg import task_groups
    >>> affinity = torch.tensor([[1.0, 0.9, 0.2, 0.1], [0.9, 1.0, 0.3, 0.2], [0.2, 0.3, 1.0, 0.8], [0.1, 0.2, 0.8, 1.0]])
    >>> task_groups(affinity, ["cat", "dog", "ship", "truck"], groups=2)
    (('cat', 'dog'), ('ship', 'truck'))
    >>> task_groups(affinity, ["cat", "dog", "ship", "truck"], method="average", distance=0.15)
    (('cat', 'dog'), ('ship',), ('truck',))
    """
    names = names_for(tasks, len(square(affinity, "affinity")))
    matrix = check_affinity(affinity, names)
    if method not in ("spectral", "average"):
        raise ConfigurationError(f"method must be 'spectral' or 'average', found {method!r}.")
    deciding = {"groups": groups, "distance": distance, "group_cost": group_cost}
    if len(given := [name for name, value in deciding.items() if value is not None]) > 1:
        raise ConfigurationError(f"{' and '.join(given)} each decide the number of groups. Pass one of them.")
    if groups is not None:
        check_number(groups, len(names))
    if distance is not None and method != "average":
        raise ConfigurationError(
            "distance cuts the tree of average linkage. Pass method='average', or a number of groups."
        )
    for name, value in (("distance", distance), ("group_cost", group_cost)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"{name} must be 0 or a positive number, found {value!r}.")
    cost = GROUP_COST if group_cost is None else group_cost
    if method == "average":
        found = _by_linkage(matrix, groups, distance, cost)
    elif groups is not None:
        found = spectral_partitions(matrix, groups, seed=seed)[0]
    else:
        found = choose_partition(matrix, branch_cost=cost, separation_weight=1.0, largest=len(names), seed=seed)
    return tuple(tuple(names[task] for task in group) for group in found)


def _by_linkage(affinity: Tensor, groups: int | None, distance: float | None, group_cost: float) -> list[list[int]]:
    merges = average_linkage(affinity)
    if distance is not None:
        groups = number_at(merges, distance)
    if groups is not None:
        return cut(merges, groups)
    return cheapest_partition(
        affinity,
        lambda number: cut(merges, number),
        branch_cost=group_cost,
        separation_weight=1.0,
        largest=len(affinity),
    )
