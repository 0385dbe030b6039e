"""Small helpers about number formats, shared by the numerical modules."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for the 16-bit formats, any other format unchanged."""
    return torch.float32 if dtype in _SIXTEEN_BITS else dtype


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Turn autocast off for ``tensor``'s kind of device, where that kind has autocast at all."""
    if tensor.device.type in ("cpu", "cuda", "xpu", "hpu", "mps"):
        try:
            return torch.autocast(tensor.device.type, enabled=False)
        except RuntimeError:  # an older torch knows no autocast for this device, so none can be on
            return contextlib.nullcontext()
    return contextlib.nullcontext()


def matmul_is_reduced() -> bool:
    """Whether float32 products may be rounded to TF32 or bfloat16, in which small differences would drown."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set in two ways that contradict each other
        return True
