"""A module whose tensors are state, not weights: they follow devices, but never change their number format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StateModule", "state_dtype"]


def state_dtype(device: torch.device) -> torch.dtype:
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class StateModule(nn.Module):
    """An ``nn.Module`` whose buffers keep their dtype under ``.to(bfloat16)``, ``.half()`` and the like."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float64:
                device = fn(torch.zeros((), dtype=torch.float32, device=tensor.device)).device
                if state_dtype(device) != torch.float64:
                    return fn(tensor.to(state_dtype(device)))
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            # Not moved.to(...): the digits are gone there already.
            dtype = state_dtype(moved.device) if tensor.is_floating_point() else tensor.dtype
            return tensor.to(device=moved.device, dtype=dtype)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
