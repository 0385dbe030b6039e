"""From a captured forward to distances between tasks.

Read in this order: ``extraction`` (:class:`SaliencyExtractor`, one forward to the saliencies of all tasks), which calls
``task_columns`` (the outputs of all tasks in one tensor), ``scalars`` (an output to one number per sample),
``input_gradients`` (gradients of these numbers; ``fixed_statistics`` for their way through a BatchNorm) and ``pooling``
(over positions); then ``distances``. ``task_saliencies`` is the same as a pure function, and ``derivatives`` looks once
whether a head's gradients are its derivatives. New metrics go into ``distances``, new scalarisations into ``scalars``.
"""

from .channel_axis import channel_axis_by_origin, mark_sequence_first
from .derivatives import Derivatives, custom_functions, derivatives_of, is_torchs_own
from .distances import BOUNDED_METRICS, METRICS, REDUCTIONS, pairwise_distances, task_distances
from .extraction import Given, Saliencies, SaliencyExtractor
from .fixed_statistics import HeadsNow, fixed_statistics, heads_as_they_are
from .pooling import Pooling, check_pool, resolve_channel_axis
from .samples import batch_first
from .scalars import (
    PIECEWISE_LINEAR_SCALARIZATIONS,
    Scalarize,
    ScalarizeChoice,
    check_scalarize,
    scalar_of,
    weighed_unequally,
)
from .task_columns import TaskColumns, task_columns
from .task_saliencies import captured_by_hand, task_saliencies

__all__ = [
    "BOUNDED_METRICS",
    "METRICS",
    "PIECEWISE_LINEAR_SCALARIZATIONS",
    "REDUCTIONS",
    "Derivatives",
    "Given",
    "HeadsNow",
    "Pooling",
    "Saliencies",
    "SaliencyExtractor",
    "Scalarize",
    "ScalarizeChoice",
    "TaskColumns",
    "batch_first",
    "captured_by_hand",
    "channel_axis_by_origin",
    "check_pool",
    "check_scalarize",
    "custom_functions",
    "derivatives_of",
    "fixed_statistics",
    "heads_as_they_are",
    "is_torchs_own",
    "mark_sequence_first",
    "pairwise_distances",
    "resolve_channel_axis",
    "scalar_of",
    "task_columns",
    "task_distances",
    "task_saliencies",
    "weighed_unequally",
]
