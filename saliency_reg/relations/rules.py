"""Euclidean projection onto the simplex."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["project_to_simplex"]


def project_to_simplex(vector: Tensor, mass: float | Tensor = 1.0) -> Tensor:
    """Return the point of ``{w : w >= 0, sum(w) = mass}`` that is closest to ``vector``.

    The minimiser is ``max(vector - theta, 0)`` with one threshold ``theta``, which a sort finds exactly
    (Held, Wolfe and Crowder 1974; Duchi et al. 2008, algorithm 1).

    Args:
        vector: ``[P]``, any finite values.
        mass: the sum of the result, ``> 0``.

    Returns:
        ``[P]``, non-negative, summing to ``mass``.

    Example:
        >>> project_to_simplex(torch.tensor([0.5, 0.5, -1.0]))
        tensor([0.5000, 0.5000, 0.0000])
    """
    # The problem does not change when a constant is added: centring avoids cancellation for large entries.
    centred = vector - vector.max()
    descending, _ = torch.sort(centred, descending=True)
    excess = descending.cumsum(0) - mass
    count = torch.arange(1, len(vector) + 1, device=vector.device, dtype=vector.dtype)
    support = (descending - excess / count > 0).sum().clamp(min=1)
    theta = excess.gather(0, support.unsqueeze(0) - 1) / support
    return (centred - theta).clamp(min=0)
