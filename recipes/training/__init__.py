"""One training: options, batches, objective, the loop, checkpoints, the best weights, and metrics."""
