"""Gradient surgery between the tasks.

Read ``weighting`` first (from the Gramian of the task gradients to the weights of their sum; the place for a new weighting),
with ``zero_rows`` (whether one with state sees absent tasks), then ``feature`` (surgery at the feature map, within the one
backward pass) or ``parameters`` (on the shared parameters, with one backward pass per task), which do not know each other.
``gramian`` has their inner products and weighted sums.
"""

from .gramian import column_gramian, gramian_of, gramian_over, row_sum, weighted_sum
from .weighting import PCGrad, Weighting, begin_anew, check_weighting, task_weights

__all__ = [
    "PCGrad",
    "Weighting",
    "begin_anew",
    "check_weighting",
    "column_gramian",
    "gramian_of",
    "gramian_over",
    "row_sum",
    "task_weights",
    "weighted_sum",
]
