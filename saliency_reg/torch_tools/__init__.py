"""What torch leaves open; knows nothing of tasks."""
