"""Five views of the relations between tasks, gathered during a normal training."""
