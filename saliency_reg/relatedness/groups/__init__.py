"""Which groups of tasks to train together."""
