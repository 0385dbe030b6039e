"""Gradient surgery at the feature map, inside the one backward pass."""
