"""Which groups of tasks to train together.

Read ``best`` first (TAG's objective, exactly), then ``task_groups`` (clusters of an affinity: ``spectral``, ``linkage``, in
``separation`` how many) and ``stability`` (whether groupings agree); ``checks`` says what may be grouped.
"""

from .best import GroupSelection, best_groups
from .checks import check_affinity, check_grouping
from .linkage import average_linkage
from .separation import branch_affinity, choose_partition, separation_cost
from .stability import GroupStability, group_stability
from .task_groups import task_groups

__all__ = [
    "GroupSelection",
    "GroupStability",
    "average_linkage",
    "best_groups",
    "branch_affinity",
    "check_affinity",
    "check_grouping",
    "choose_partition",
    "group_stability",
    "separation_cost",
    "task_groups",
]
