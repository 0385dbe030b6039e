"""Which tasks belong together.

Read ``weights`` first (:class:`RelationWeights`), then ``rules`` (how the weights are learned; the place for a new rule) and
``pending_distances`` (distances of micro-batches since the last optimizer step); ``partition_sum`` is for very many tasks.
"""

from .pending_distances import ALL_PAIRS, PendingDistances, taken
from .weights import RelationWeights

__all__ = ["ALL_PAIRS", "PendingDistances", "RelationWeights", "taken"]
