"""Architectures for many tasks, all from the same backbone and heads: begin with ``blueprint.py`` and ``registry.py``."""
