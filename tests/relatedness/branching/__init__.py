"""Models that split along the affinity of their tasks."""
