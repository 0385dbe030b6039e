"""From the gradient of a task at a feature map to one number per position."""

# ruff: noqa: ARG001  (one signature for all methods)
from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def _gradient(gradient: Tensor, activation: Tensor) -> Tensor:
    """``||G||`` over the channels."""
    return gradient.square().sum(1).sqrt()


def _gradient_times_activation(gradient: Tensor, activation: Tensor) -> Tensor:
    """``sum_c G_c A_c`` (HiResCAM, Draelos and Carin 2020)."""
    return (gradient * activation).sum(1)


def _grad_cam(gradient: Tensor, activation: Tensor) -> Tensor:
    """``relu(sum_c mean(G_c) A_c)`` (Selvaraju et al. 2017)."""
    return (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu()


#: ``[B, C, H, W]`` gradient and feature map -> ``[B, H, W]``.
MAP_METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradient_times_activation": _gradient_times_activation,
    "gradient": _gradient,
    "grad_cam": _grad_cam,
}
