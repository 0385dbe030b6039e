"""Optional packages, imported when they are first needed."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import MissingPackageError

#: The extra that brings a package.
_EXTRAS = {
    "accelerate": "accelerate",
    "matplotlib": "plot",
    "numpy": "plot",
    "scipy": "plot",
    "safetensors": "timm",
    "timm": "timm",
    "transformers": "transformers",
}


def need(name: str) -> Any:
    """Import a module of an optional package, or raise :class:`MissingPackageError`, which names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingPackageError(
            f'{package} could not be imported ({error}). Run: pip install "saliency-reg[{_EXTRAS[package]}]"'
        ) from error
