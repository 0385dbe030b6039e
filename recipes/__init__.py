"""Runnable trainings: ``python -m recipes.NAME``."""
