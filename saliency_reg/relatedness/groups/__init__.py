"""Which groups of tasks to train together."""

from .checks import check_grouping
from .separation import branch_affinity, choose_partition, separation_cost

__all__ = ["branch_affinity", "check_grouping", "choose_partition", "separation_cost"]
