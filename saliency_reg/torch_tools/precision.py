"""Number formats: which one to compute in, and whether autocast or TF32 reduces it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Turn autocast off for ``tensor``'s kind of device, where that kind has autocast at all."""
    if tensor.device.type in ("cpu", "cuda", "xpu", "hpu", "mps"):
        with contextlib.suppress(RuntimeError):  # an older torch knows no autocast for this device, so none can be on
            return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def matmul_is_reduced() -> bool:
    """Tell whether float32 products may be rounded to TF32 or bfloat16, in which small differences would drown."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set in two ways that contradict each other
        return True
