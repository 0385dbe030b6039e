"""An encoder of transformers with a head for each task."""

from typing import Any


def __getattr__(name: str) -> Any:
    # Not before it is asked for: this imports transformers.
    if name != "MultiTaskModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .model import MultiTaskModel

    return MultiTaskModel
