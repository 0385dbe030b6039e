"""Lu et al. (CVPR 2017): a network that splits, from the top down, along the affinity of its tasks.

Read ``trace`` and ``stages`` (how a backbone is cut), ``tree`` (who shares what), ``branching_model``, ``optimizer_copies``,
and ``growth`` (which columns to split).
"""

from .branching_model import BranchingModel
from .growth import BranchingRound, branch
from .stages import Stage, cut

__all__ = ["BranchingModel", "BranchingRound", "Stage", "branch", "cut"]
