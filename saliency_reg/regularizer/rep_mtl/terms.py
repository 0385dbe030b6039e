"""The two terms of Rep-MTL as functions of saliencies ``[B, T, C, P]`` at ``P`` positions, without ``[C, C]`` matrices.

Everything is exact: with ``S`` of ``[C, P]`` and anchors ``A`` of ``[C, T]``, ``<SS', AA'>`` is ``|A'S|^2`` and ``|SS'|`` is
``|S'S|`` (Frobenius), so that a cosine between ``[C, C]`` matrices takes ``[T, P]`` numbers and the smaller Gramian.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positions_entropy(signed: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the positions of the entropy of the tasks' shares, and how many positions there are (eq. 4 to 6).

    ``signed`` ``[B, T, P]`` are saliencies averaged over the channels. The shares of a position are their absolute values
    over their sum. ``counts`` ``[B]`` says which samples do; positions without any saliency do not.
    """
    size = signed.abs()
    total = size.sum(1, keepdim=True)
    zero = total < torch.finfo(size.dtype).tiny  # NaN is not, and propagates
    share = size / torch.where(zero, torch.ones_like(total), total)
    # 1 log 1 in the place of 0 log 0, whose derivative is no number.
    share = torch.where((share == 0) | zero, torch.ones_like(share), share)
    entropy = -(share * share.log()).sum(1)  # [B, P]
    counted = ~zero.squeeze(1) & counts.unsqueeze(1)
    return torch.where(counted, entropy, torch.zeros_like(entropy)).sum(), counted.sum()


def unit_anchors(means: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scale anchors ``A_b`` ``[B, T, C]``, such that ``A_b A_b'`` has length 1; also return ``[B]``, which ones have any.

    ``counts`` ``[B]`` says which samples have one. The others are zeros.
    """
    # Without dividing by the largest entry first, fourth powers would underflow. The result does not depend on it.
    largest = means.detach().abs().flatten(1).amax(1)
    counts = counts & ~(largest < torch.finfo(means.dtype).tiny)
    some = counts.view(-1, 1, 1)
    scaled = torch.where(some, means, torch.zeros_like(means))
    scaled = scaled / torch.where(counts, largest, torch.ones_like(largest)).view(-1, 1, 1)
    square = (scaled @ scaled.transpose(1, 2)).square().sum((1, 2))  # |A'A|^2, [B]
    return scaled * torch.where(counts, square, torch.ones_like(square)).pow(-0.25).view(-1, 1, 1), counts


def alignment(saliencies: Tensor, anchors: Tensor, has: Tensor) -> Tensor:
    """Return ``[B, T]``, in ``[0, 1]``: cosine between a task's ``S S'`` and its sample's anchor ``A A'`` (eq. 7, 8).

    ``saliencies`` ``[B, T, C, P]``, unit anchors ``[B, T, C]``; 0 for a task that ``has`` ``[B, T]`` no saliency.
    """
    largest = saliencies.detach().abs().flatten(2).amax(2)
    has = has & ~(largest < torch.finfo(saliencies.dtype).tiny)
    some = has.unsqueeze(2).unsqueeze(3)
    scaled = torch.where(some, saliencies, torch.zeros_like(saliencies))
    scaled = scaled / torch.where(has, largest, torch.ones_like(largest)).unsqueeze(2).unsqueeze(3)
    product = (anchors.unsqueeze(1) @ scaled).square().sum((2, 3))  # |A'S|^2 of [B, T, T, P]
    by_position = scaled.shape[3] <= scaled.shape[2]
    gramian = scaled.transpose(2, 3) @ scaled if by_position else scaled @ scaled.transpose(2, 3)
    square = gramian.square().sum((2, 3))
    return product * torch.where(has, square, torch.ones_like(square)).rsqrt()


def anchor_products(anchors: Tensor) -> Tensor:
    """Return ``[B, B]``: cosines between ``A_b A_b'`` of unit anchors ``[B, T, C]``, by the smaller of two exact ways."""
    samples, tasks, channels = anchors.shape
    if samples * tasks * tasks <= channels * channels:
        products = anchors.flatten(0, 1) @ anchors.flatten(0, 1).T
        return products.view(samples, tasks, samples, tasks).square().sum((1, 3))
    matrices = (anchors.transpose(1, 2) @ anchors).flatten(1)
    return matrices @ matrices.T


def spread_over_others(products: Tensor, temperature: float) -> Tensor:
    """Return ``[B]``: ``log sum_{k != b} exp(products_bk / temperature)``, the denominator of eq. 9; for ``B >= 2``."""
    same = torch.eye(len(products), dtype=torch.bool, device=products.device)
    return (products / temperature).masked_fill(same, -torch.inf).logsumexp(1)
