"""Gradient surgery at the feature map that the heads share, inside the one backward pass.

Read in this order: ``fork`` (:class:`GradientFork`, the autograd node that gives each head an alias; its ``backward`` runs
in the backward pass), ``combiner`` (:class:`GradientCombiner`, what it does with the gradients: their Gramian, the
weights, the weighted sum), ``forked_aliases`` (how heads get these aliases), ``columns`` (one head with a column per task),
``penalty_bypass`` (how the gradient of the penalty passes the fork unweighed), ``feature_surgery`` (the public class),
``gradnorm`` (one with weights that are learned from the losses, too, as ``loss_balance`` says).
"""

from .combiner import GradientCombiner
from .feature_surgery import FeatureSurgery
from .forked_aliases import ForkedAliases
from .gradnorm import GradNorm
from .penalty_bypass import joining_collectives, kept_out_of_surgery

__all__ = [
    "FeatureSurgery",
    "ForkedAliases",
    "GradNorm",
    "GradientCombiner",
    "joining_collectives",
    "kept_out_of_surgery",
]
