"""Errors of the recipes, also of packages that are missing. Every message says what was found and what to use instead."""

from __future__ import annotations

import importlib
from types import ModuleType


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


class MissingPackageError(RecipeError, ImportError):
    """A package of an extra is not installed."""


def need(name: str) -> ModuleType:
    """Import a module of the ``recipes`` extra, or of a further one, or say how to install it.

    Raises:
        MissingPackageError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(top, top)
        extra = {"timm": "recipes,timm", "transformers": "recipes,transformers", "rdkit": "molecules"}.get(
            top, "recipes"
        )
        raise MissingPackageError(
            f'this recipe needs {package}, which could not be imported. Run: pip install "saliency-reg[{extra}]"'
        ) from error
