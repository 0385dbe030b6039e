"""Gradient surgery between tasks."""
