"""What is trained on: kinds of tasks, label columns, splits, and data sets."""
