"""Gradient surgery on shared parameters, with one backward pass per task."""
