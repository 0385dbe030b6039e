"""Lasso and L21: their values, and their proximal operators ``argmin_w 1/2 |w - z|^2 + s g(w)``.

A block is a weight ``[D, n]`` of one head: its inputs first, everything else behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch
from torch import Tensor

#: A number, or a 0-dim tensor: the learning rates of some optimizers are tensors.
Threshold = Union[float, Tensor]


def l1_value(blocks: Sequence[Tensor]) -> Tensor:
    """Return ``sum |U|``, 0-dim."""
    return torch.stack([block.abs().sum() for block in blocks]).sum()


def l21_value(blocks: Sequence[Tensor]) -> Tensor:
    """Return ``sum_d |u_d|_2``, 0-dim; ``u_d`` is what all blocks have for input ``d``."""
    return _group_norms(blocks).sum()


def l1_step(block: Tensor, threshold: Threshold) -> Tensor:
    """Return ``sign(z) max(|z| - s, 0)``: exactly 0 where ``|z| <= s``."""
    return block.sign() * (block.abs() - threshold).clamp(min=0)


def l21_step(blocks: Sequence[Tensor], threshold: Threshold) -> list[Tensor]:
    """Return ``z_d max(0, 1 - s / |z_d|)`` for each input, across all blocks: exactly 0 where ``|z_d| <= s``."""
    norms = _group_norms(blocks)
    # Not 1 - s / norm, which has no value at 0 for a threshold of 0 (a learning rate that warms up).
    factors = (norms - threshold).clamp(min=0) / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return [block * factors.to(block.device).unsqueeze(1) for block in blocks]


def _group_norms(blocks: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(block, dim=1).to(blocks[0].device) for block in blocks]
    together: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return together
