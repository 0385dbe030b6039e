"""From accumulated task gradients to factors of the tasks, and from these to similarities."""

from __future__ import annotations

import torch
from torch import Tensor

#: Eigenvalues that differ by no more than this share of the largest are one.
_TIE = 1e-6
#: Shares of energy that differ by no more are one.
_ROUNDING = 1e-12
#: Factors of unit rows that are shorter than this hold rounding alone.
_NOTHING = 1e-6


def unit_rows(gradients: Tensor) -> Tensor:
    """Return ``[T, E, D]`` with each task's entries scaled to length 1 together; zeros stay."""
    rows = gradients.flatten(1)
    tiny = torch.finfo(rows.dtype).tiny
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(tiny)  # so that squares stay in range
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return (rows / lengths.clamp_min(tiny)).view_as(gradients)


def gramian_of_gradients(units: Tensor) -> Tensor:
    """Return the cosines of the gradients, ``<g_i, g_j>``: ``[T, E, D] -> [T, T]``."""
    rows = units.flatten(1)
    return rows @ rows.T


def gramian_of_inputs(units: Tensor) -> Tensor:
    """Return cosines of the second moments at the inputs, ``<g_i' g_i, g_j' g_j> = |g_i g_j'|^2``: ``[T, E, D] -> [T, T]``.

    ``g_t' g_t`` ``[D, D]`` says from which directions of the shared representation a task draws. Where these are ``r``
    orthonormal ones, the cosine is the mean squared cosine of the principal angles between two tasks. It is in [0, 1].
    """
    tasks, width, _ = units.shape
    across = units.flatten(0, 1).T
    products = torch.stack([(one @ across).square().view(width, tasks, width).sum((0, 2)) for one in units])
    products = (products + products.T) / 2
    lengths = products.diagonal().sqrt()
    return products / (lengths.unsqueeze(0) * lengths.unsqueeze(1))


GRAMIANS = {"inputs": gramian_of_inputs, "gradients": gramian_of_gradients}


def task_factors(gramian: Tensor, energy: float = 0.9) -> Tensor:
    """Return the factors ``F = U_r diag(s_r)`` of rows whose Gramian this is.

    ``U diag(s) V'`` is the thin SVD of the rows ``[T, N]``; their Gramian ``[T, T]`` has the eigenvectors ``U`` and the
    eigenvalues ``s^2``, so that ``V`` is not needed. ``r`` is the smallest rank with ``energy`` of ``sum s^2``. Of equal
    eigenvalues all stay, since which of their eigenvectors come first is chance. Signs of the columns are chance, too, and
    do not count in inner products of the rows.

    Args:
        gramian: ``[T, T]``, symmetric.
        energy: in ``(0, 1]``.

    Returns:
        ``[T, r]``, the largest factor first.
    """
    eigh: tuple[Tensor, Tensor] = torch.linalg.eigh(gramian)  # from the smallest on
    values, vectors = eigh[0].flip(0).clamp_min(0.0), eigh[1].flip(1)
    kept = values.cumsum(0)
    rank = min(int((kept < (energy - _ROUNDING) * kept[-1]).sum()) + 1, len(values))
    while rank < len(values) and values[rank] >= values[rank - 1] - _TIE * values[0]:
        rank += 1
    return vectors[:, :rank] * values[:rank].sqrt()


def cosines(factors: Tensor) -> Tensor:
    """Return ``[T, T]`` cosines of the rows ``[T, r]``; 0 beside a row of zeros, the diagonal 1.

    A task of which the factors keep nothing is like no other.
    """
    lengths = torch.linalg.vector_norm(factors, dim=1, keepdim=True)
    units: Tensor = torch.where(lengths > _NOTHING, factors / lengths.clamp_min(_NOTHING), 0.0)
    return (units @ units.T).clamp(-1.0, 1.0).fill_diagonal_(1.0)
