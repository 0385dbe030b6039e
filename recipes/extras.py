"""Packages that only the recipes need, imported when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["need"]


def need(name: str) -> ModuleType:
    """Import a module of the ``recipes`` extra, or say how to install it.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(name.partition(".")[0], name.partition(".")[0])
        raise ImportError(
            f'this recipe needs {package}, which could not be imported. Type: pip install "saliency-reg[recipes]"'
        ) from error
