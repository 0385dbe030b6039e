"""Selective Sharing (Strezoski et al., ICMR 2019), by our reading: tasks that come to share an estimator.

Read in this order: ``selective_sharing`` (:class:`SelectiveSharing`: gathers gradients, proposes groups, shares),
``estimators`` (which parts of the heads they are), ``estimator_gradients`` and ``factors`` (from gradients to similarities),
``clusters`` (from these to groups), ``grouping`` (who shares with whom), ``merging`` (what changes in model and optimizer),
``known_groups`` (sharing without gradients).
"""

from .known_groups import share_estimators
from .selective_sharing import SelectiveSharing

__all__ = ["SelectiveSharing", "share_estimators"]
