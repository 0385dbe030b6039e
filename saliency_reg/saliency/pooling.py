"""From input gradients to one vector per sample: pooled over positions, with a mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigurationError, ShapeError, WrongTypeError
from ..torch_tools import at_least_float32, without_autocast


class Pooling:
    """Pools the gradients at a feature map of one shape over its positions; ``mask`` is ``[B, positions...]``."""

    def __init__(self, shape: torch.Size, channel_axis: int | None, pool: str | None, mask: Tensor | None) -> None:
        self.channel_axis = resolve_channel_axis(shape, channel_axis)
        self._pool = pool
        self._mask = mask
        self._positions = position_sizes(shape, self.channel_axis)
        # A factor for the gradient that keeps it representable behind an average over the positions: GradScaler does not
        # scale the inner gradient, and 1/(H*W) alone can underflow float16. A power of two is exact in every other format.
        self.scale = float(2 ** min(round(math.log2(max(math.prod(self._positions), 1))), 10))
        #: Whether a pooled gradient tells all that there was in it.
        self.keeps_all = mask is None and (pool is None or not self._positions)
        if mask is None:
            return
        if not isinstance(mask, Tensor):
            raise WrongTypeError(f"mask must be a tensor, found {type(mask).__name__}.")
        if len(shape) == 2:
            raise ShapeError(
                f"the feature map {list(shape)} has no positions, so a mask of shape {list(mask.shape)} has nothing to "
                "mask. Leave mask= out, or choose a feature that still has its positions."
            )
        if list(mask.shape) != (expected := [shape[0], *self._positions]):
            raise ShapeError(
                f"mask has shape {list(mask.shape)}, expected {expected}: the feature map {list(shape)} without its "
                f"channel axis {self.channel_axis}. Pass channel_axis= if that axis is wrong."
            )

    def pooled(self, gradient: Tensor, scale: float = 1.0) -> Tensor:
        """Return ``[B, C, positions...]`` as ``[B, C]`` (not for ``pool=None``), over ``scale``, at least float32."""
        dtype = at_least_float32(gradient.dtype)
        axes = [axis for axis in range(1, gradient.ndim) if axis != self.channel_axis]
        mask = self._mask
        with without_autocast(gradient):
            if mask is not None:
                mask = mask.to(gradient.device) != 0
                gradient = torch.where(mask.unsqueeze(self.channel_axis), gradient, torch.zeros_like(gradient))
            if self._pool is None or not axes:
                return gradient.to(dtype) * (1.0 / scale)
            total = gradient.sum(axes, dtype=dtype) * (1.0 / scale)
            if self._pool == "sum":
                return total
            if mask is None:
                return total / math.prod(self._positions)
            return total / mask.flatten(1).sum(1, keepdim=True).clamp(min=1)


def check_pool(pool: str | None) -> None:
    if pool not in ("sum", "mean", None):
        raise ConfigurationError(f"unknown pool {pool!r}. Choose 'sum' or 'mean' over positions, or None to keep them.")


def resolve_channel_axis(shape: torch.Size, channel_axis: int | None) -> int:
    """Return the channel axis as a positive number; the default is 1, or 2 for ``[B, L, C]``."""
    rank = len(shape)
    if rank < 2:
        raise ShapeError(
            f"a feature map must be [B, C], [B, L, C] or [B, C, H, W], found {list(shape)}. Add a channel axis with "
            "feature.unsqueeze(1)."
        )
    if channel_axis is None:
        return 2 if rank == 3 else 1
    axis = channel_axis + rank if channel_axis < 0 else channel_axis
    if not 1 <= axis < rank:
        raise ShapeError(
            f"channel_axis={channel_axis} is not a channel axis of a feature map of shape {list(shape)}. Use 1..{rank - 1}"
            " or -1 (axis 0 is the batch)."
        )
    return axis


def position_sizes(shape: torch.Size, channel_axis: int) -> list[int]:
    return [size for axis, size in enumerate(shape) if axis not in (0, channel_axis)]
