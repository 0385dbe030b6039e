"""What all trainings of many tasks share: kinds of tasks, labels that may be missing, methods, one training, and studies."""
