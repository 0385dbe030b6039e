"""The comparison of all methods on one data set: begin with ``problem.py`` and ``cells.py``."""
