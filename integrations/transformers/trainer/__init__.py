"""The Trainer with the penalty in its loss."""
