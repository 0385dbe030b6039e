"""The data sets of the comparison: begin with ``registry.py``."""
