"""From a captured forward to distances between tasks.

Read in this order: ``extraction`` (:class:`SaliencyExtractor`, one forward to the saliencies of all tasks), which calls
``scalars`` (an output to one number per sample), ``input_gradients`` (gradients of these numbers; ``fixed_statistics`` for
their way through a BatchNorm) and ``pooling`` (over positions); then ``distances``. ``task_saliencies`` is the same as a
pure function, and ``derivatives`` looks once whether a head's gradients are its derivatives. New metrics go into
``distances``, new scalarisations into ``scalars``.
"""

from .derivatives import Derivatives, custom_functions, derivatives_of, is_torchs_own
from .distances import BOUNDED_METRICS, METRICS, REDUCTIONS, pairwise_distances, task_distances
from .extraction import Given, Saliencies, SaliencyExtractor
from .fixed_statistics import HeadsNow, fixed_statistics, heads_as_they_are
from .pooling import check_pool, resolve_channel_axis
from .scalars import PIECEWISE_LINEAR_SCALARIZATIONS, ScalarizeChoice, axis_of_columns, check_scalarize, scalar_of
from .task_saliencies import captured_by_hand, task_saliencies

__all__ = [
    "BOUNDED_METRICS",
    "METRICS",
    "PIECEWISE_LINEAR_SCALARIZATIONS",
    "REDUCTIONS",
    "Derivatives",
    "Given",
    "HeadsNow",
    "Saliencies",
    "SaliencyExtractor",
    "ScalarizeChoice",
    "axis_of_columns",
    "captured_by_hand",
    "check_pool",
    "check_scalarize",
    "custom_functions",
    "derivatives_of",
    "fixed_statistics",
    "heads_as_they_are",
    "is_torchs_own",
    "pairwise_distances",
    "resolve_channel_axis",
    "scalar_of",
    "task_distances",
    "task_saliencies",
]
