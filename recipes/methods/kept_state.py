"""What modules of TorchJD keep outside of parameters and buffers, so that it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, tuple, list, Tensor)


def kept_in(module: nn.Module, *, buffers: bool = False) -> dict[str, dict[str, Any]]:
    """Plain values in attributes of the module and those in it, by their names.

    With ``buffers`` also those, present or not: some come with the first call, and are then no part of the ``state_dict`` of
    a new module.
    """
    everywhere = vars(nn.Module())
    return {
        name: {
            key: value
            for key, value in {**vars(own), **(own._buffers if buffers else {})}.items()
            if key not in everywhere and isinstance(value, _PLAIN)
        }
        for name, own in module.named_modules()
    }


def restore(module: nn.Module, kept: Mapping[str, Mapping[str, Any]]) -> None:
    """Set what :func:`kept_in` returned for a module that was built alike."""
    for name, own in module.named_modules():
        for key, value in kept[name].items():
            setattr(own, key, value.clone() if isinstance(value, Tensor) else value)
