"""Gradient surgery written down as plainly as possible: whole gradients, loops over pairs, no Gramian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def textbook_pcgrad(gradients: Sequence[Tensor], order: Sequence[Sequence[int]] | Tensor) -> Tensor:
    """Algorithm 1 of Yu et al. (2020) on task gradients of any shape; ``order[i]``: the others as task ``i`` meets them."""
    total = torch.zeros_like(gradients[0])
    for task, gradient in enumerate(gradients):
        projected = gradient.clone()
        for other in order[task]:
            other_gradient = gradients[int(other)]
            product = (projected * other_gradient).sum()
            if product < 0:
                projected = projected - product / (other_gradient * other_gradient).sum() * other_gradient
        total = total + projected
    return total


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """``dL/dparameters`` as one vector; zero where the loss does not depend on a parameter. Keeps the graph."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    parts = [
        torch.zeros(parameter.numel(), dtype=parameter.dtype) if gradient is None else gradient.reshape(-1)
        for parameter, gradient in zip(parameters, gradients)
    ]
    return torch.cat(parts)


def split_like(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The vector's parts in the shapes of the parameters."""
    parts = flat.split([parameter.numel() for parameter in parameters])
    return [part.reshape(parameter.shape) for part, parameter in zip(parts, parameters)]


def conflicting_pairs(gradients: Sequence[Tensor]) -> int:
    """Pairs of gradients with a negative product."""
    return sum(float((one * other).sum()) < 0 for i, one in enumerate(gradients) for other in gradients[:i])
