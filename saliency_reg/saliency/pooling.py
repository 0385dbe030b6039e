"""From input gradients to one vector per sample: pooled over positions, with a mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigurationError, ShapeError, WrongTypeError
from ..torch_tools import at_least_float32, without_autocast


def pool_positions(gradient: Tensor, pool: str | None, mask: Tensor | None, channel_axis: int, scale: float) -> Tensor:
    """Pool ``[B, C, positions...]`` to ``[B, C]`` (not for ``pool=None``), divided by ``scale``, at least float32."""
    dtype = at_least_float32(gradient.dtype)
    axes = [axis for axis in range(1, gradient.ndim) if axis != channel_axis]
    with without_autocast(gradient):
        if mask is not None:
            mask = mask.to(gradient.device) != 0
            gradient = torch.where(mask.unsqueeze(channel_axis), gradient, torch.zeros_like(gradient))
        if pool is None or not axes:
            return gradient.to(dtype) * (1.0 / scale)
        total = gradient.sum(axes, dtype=dtype) * (1.0 / scale)
        if pool == "sum":
            return total
        if mask is None:
            return total / math.prod(position_sizes(gradient.shape, channel_axis))
        return total / mask.flatten(1).sum(1, keepdim=True).clamp(min=1)


def gradient_scale(shape: torch.Size, channel_axis: int) -> float:
    """Return a power of two near the number of positions: the gradient behind an average over them stays representable.

    GradScaler does not scale the inner gradient, and ``1/(H*W)`` alone can underflow float16. A power of two is
    exact in every other format.
    """
    number = math.prod(position_sizes(shape, channel_axis))
    return float(2 ** min(round(math.log2(max(number, 1))), 10))


def position_sizes(shape: torch.Size, channel_axis: int) -> list[int]:
    return [size for axis, size in enumerate(shape) if axis not in (0, channel_axis)]


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


def check_pool(pool: str | None) -> None:
    if pool not in ("sum", "mean", None):
        raise ConfigurationError(f"unknown pool {pool!r}. Choose 'sum' or 'mean' over positions, or None to keep them.")


def check_mask(mask: Tensor | None, shape: torch.Size, channel_axis: int) -> None:
    """Refuse a mask that has not the feature's shape without its channel axis."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise WrongTypeError(f"mask must be a tensor, found {type(mask).__name__}.")
    if len(shape) == 2:
        raise ShapeError(
            f"the feature map {list(shape)} has no positions, so a mask of shape {list(mask.shape)} has nothing to mask. "
            "Leave mask= out, or choose a feature that still has its positions."
        )
    expected = [shape[0], *position_sizes(shape, channel_axis)]
    if list(mask.shape) != expected:
        raise ShapeError(
            f"mask has shape {list(mask.shape)}, expected {expected}: the feature map {list(shape)} without its channel "
            f"axis {channel_axis}. Pass channel_axis= if that axis is wrong."
        )
