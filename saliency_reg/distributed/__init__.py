"""Joined over data-parallel processes."""
