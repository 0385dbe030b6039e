"""From input gradients to one vector per sample: pooled over positions, with a mask."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigurationError, ShapeError, WrongTypeError
from ..torch_tools import at_least_float32, without_autocast


class Pooling:
    """Pools the gradients at a feature map of one shape over its positions; ``mask`` is ``[B, positions...]`` or ``[B]``."""

    def __init__(
        self,
        shape: torch.Size,
        channel_axis: int | None,
        pool: str | None,
        mask: Tensor | None,
        batch_axis: int = 0,
    ) -> None:
        self._batch_axis = resolve_batch_axis(shape, batch_axis)
        #: With the batch axis first, as is all that comes out of here.
        self.channel_axis = resolve_channel_axis(shape, channel_axis, self._batch_axis)
        self.shape = _batch_first(shape, self._batch_axis)
        self._pool = pool
        #: ``[B]``, which samples have a real position; ``None``: all.
        self.real: Tensor | None = None
        self._mask: Tensor | None = None
        self._positions = position_sizes(self.shape, self.channel_axis)
        # A factor for the gradient that keeps it representable behind an average over the positions: GradScaler does not
        # scale the inner gradient, and 1/(H*W) alone can underflow float16. A power of two is exact in every other format.
        self.scale = float(2 ** min(round(math.log2(max(math.prod(self._positions), 1))), 10))
        #: Whether a pooled gradient tells all that there was in it.
        self.keeps_all = mask is None and (pool is None or not self._positions)
        if mask is None:
            return
        if not isinstance(mask, Tensor):
            raise WrongTypeError(f"mask must be a tensor, found {type(mask).__name__}.")
        samples, expected = [self.shape[0]], [self.shape[0], *self._positions]
        if list(mask.shape) not in (samples, expected):
            if not self._positions:
                raise ShapeError(
                    f"mask has shape {list(mask.shape)}, but the feature map {list(shape)} has no positions. Pass one "
                    f"value per sample, {samples}, leave mask= out, or choose a feature that still has its positions."
                )
            raise ShapeError(
                f"mask has shape {list(mask.shape)}, expected {expected}: the feature map {list(shape)}, batch first, "
                f"without its channel axis {self.channel_axis} (or {samples}, one value per sample). Pass "
                "channel_axis= if that axis is wrong."
            )
        mask = mask != 0
        self.real = mask.flatten(1).any(1) if mask.ndim > 1 else mask
        self._mask = mask.view(samples + [1] * (len(expected) - mask.ndim) + list(mask.shape[1:])).expand(expected)

    def pooled(self, gradient: Tensor, scale: float = 1.0) -> Tensor:
        """Return ``[B, C, positions...]`` as ``[B, C]`` (not for ``pool=None``), over ``scale``, at least float32."""
        dtype = at_least_float32(gradient.dtype)
        if self._batch_axis:
            gradient = gradient.movedim(self._batch_axis, 0)
        axes = [axis for axis in range(1, gradient.ndim) if axis != self.channel_axis]
        mask = self._mask
        with without_autocast(gradient):
            if mask is not None:
                mask = mask.to(gradient.device)
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


def resolve_batch_axis(shape: Sequence[int], batch_axis: int) -> int:
    """Return the batch axis as a number from 0 on."""
    rank = len(shape)
    if isinstance(batch_axis, bool) or not isinstance(batch_axis, int):
        raise WrongTypeError(f"batch_axis must be an int, found {type(batch_axis).__name__}. Pass 1 for [L, B, C].")
    if not -rank <= batch_axis < rank:
        raise ShapeError(
            f"batch_axis={batch_axis} is no axis of a feature map of shape {list(shape)}. Use 0..{rank - 1}."
        )
    return batch_axis % rank


def _batch_first(shape: Sequence[int], batch_axis: int) -> torch.Size:
    return torch.Size([shape[batch_axis], *(size for axis, size in enumerate(shape) if axis != batch_axis)])


def resolve_channel_axis(shape: Sequence[int], channel_axis: int | None, batch_axis: int = 0) -> int:
    """Return where the channel axis of ``shape`` is once the batch axis is moved to 0; by default 1, or 2 of 3 axes."""
    rank = len(shape)
    if rank < 2:
        raise ShapeError(
            f"a feature map must be [B, C], [B, L, C] or [B, C, H, W], found {list(shape)}. Add a channel axis with "
            "feature.unsqueeze(1)."
        )
    if channel_axis is None:
        return 2 if rank == 3 else 1
    axis = channel_axis + rank if channel_axis < 0 else channel_axis
    if not 0 <= axis < rank or axis == batch_axis:
        others = ", ".join(str(other) for other in range(rank) if other != batch_axis)
        raise ShapeError(
            f"channel_axis={channel_axis} is not a channel axis of a feature map of shape {list(shape)}. Use one of {others}"
            f" (axis {batch_axis} is the batch)."
        )
    return axis if axis > batch_axis else axis + 1


def position_sizes(shape: Sequence[int], channel_axis: int) -> list[int]:
    return [size for axis, size in enumerate(shape) if axis not in (0, channel_axis)]
