"""Which tasks belong together."""

from .weights import RelationWeights

__all__ = ["RelationWeights"]
