"""Packages that only the recipes need, imported when they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["need"]


def need(name: str) -> ModuleType:
    """Import a module of the ``recipes`` (or ``timm``, or ``transformers``) extra, or say how to install it.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(top, top)
        extra = f"recipes,{top}" if top in ("timm", "transformers") else "recipes"
        raise ImportError(
            f'this recipe needs {package}, which could not be imported. Run: pip install "saliency-reg[{extra}]"'
        ) from error
