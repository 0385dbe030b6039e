"""transformers itself, imported when it is first needed."""

from __future__ import annotations

import importlib
from typing import Any

from saliency_reg.errors import MissingPackageError

__all__ = ["import_transformers"]


def import_transformers() -> Any:
    """The module ``transformers``.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingPackageError(
            f'transformers could not be imported ({error}). Type: pip install "saliency-reg[transformers]"'
        ) from error
