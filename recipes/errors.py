"""Errors of the recipes. Every message says what was found, what was expected, and what to use instead."""

from __future__ import annotations

__all__ = ["CheckpointError", "CheckpointMismatchError", "DataError", "OptionError", "RecipeError"]


class RecipeError(Exception):
    """Base class of every error that the recipes raise."""


class OptionError(RecipeError, ValueError):
    """An option has a value that cannot work, alone or with the others."""


class DataError(RecipeError, ValueError):
    """Files, columns or labels cannot be used as they are."""


class CheckpointError(RecipeError, RuntimeError):
    """A checkpoint is missing, or not whole."""


class CheckpointMismatchError(CheckpointError):
    """A checkpoint is whole, but belongs to another training."""
