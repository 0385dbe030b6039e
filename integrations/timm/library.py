"""timm itself, imported when it is first needed."""

from __future__ import annotations

import importlib
from typing import Any

from saliency_reg.errors import MissingPackageError

__all__ = ["import_safetensors", "import_timm"]


def import_timm() -> Any:
    """The module ``timm``.

    Raises:
        MissingPackageError: it is not installed.
    """
    return _imported("timm")


def import_safetensors() -> Any:
    """The module ``safetensors.torch``.

    Raises:
        MissingPackageError: it is not installed.
    """
    return _imported("safetensors.torch")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingPackageError(
            f'{package} could not be imported ({error}). Type: pip install "saliency-reg[timm]"'
        ) from error
