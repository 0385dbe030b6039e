"""Views on one scale: closeness (larger is closer), affinity (in [0, 1]), and their consensus."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .kinds import ViewKind
from .ranks import average_ranks


def closeness_of(kind: ViewKind, matrix: Tensor) -> Tensor:
    """Return ``[..., T, T]``, symmetric and larger where tasks are closer: a distance with its sign turned, TAG by the mean
    of both directions."""
    both = (matrix + matrix.transpose(-1, -2)) / 2
    return -both if kind.closer == "smaller" else both


def affinity_of(kind: ViewKind, matrix: Tensor) -> Tensor:
    """Return ``[T, T]``, symmetric and in ``[0, 1]``, larger where tasks are closer; NaN where nothing is known.

    By the range of the view: a distance ``D`` becomes ``1 - D / max D``; what is in ``[-1, 1]`` becomes ``(1 + x) / 2``;
    what is in ``[0, 1]`` stays; weights are divided by the largest one between two tasks; what has no bounds (TAG) is scaled
    linearly, from the smallest to the largest one between two tasks (0.5 if these are equal). The diagonals of the last two
    are 1.
    """
    both = (matrix + matrix.T) / 2
    off = ~torch.eye(len(both), dtype=torch.bool)
    known = both[off & ~both.isnan()]
    low, high = (float(known.min()), float(known.max())) if known.numel() else (0.0, 0.0)
    if kind.closer == "smaller":
        return (1 - both / high).clamp(0, 1) if high > 0 else torch.where(both.isnan(), both, 1.0)
    if kind.highest == 1:
        return ((1 + both) / 2 if kind.lowest < 0 else both).clamp(0, 1)
    if kind.lowest == 0:
        scaled = both / high if high > 0 else both
    else:
        scaled = (both - low) / (high - low) if high > low else torch.where(both.isnan(), both, 0.5)
    return torch.where(off, scaled, 1.0).clamp(0, 1)


def filled(affinity: Tensor, fill: float) -> Tensor:
    """Return ``[T, T]`` with a number where nothing is known of two tasks, and 1 on the diagonal there."""
    unknown = affinity.isnan()
    return torch.where(unknown, torch.where(torch.eye(len(affinity), dtype=torch.bool), 1.0, fill), affinity)


def consensus_of(closeness: Iterable[Tensor], size: int) -> Tensor:
    """Return ``[T, T]``: the mean rank of each pair over the views that know it, 0 for the last and 1 for the closest."""
    row, column = torch.triu_indices(size, size, 1)
    ranks = [torch.full((len(row),), torch.nan, dtype=torch.float64)]
    for matrix in closeness:
        values = matrix[row, column]
        known = ~values.isnan()
        places = torch.full_like(values, torch.nan)
        count = int(known.sum())
        places[known] = (average_ranks(values[known]) - 1) / (count - 1) if count > 1 else 0.5
        ranks.append(places)
    mean = torch.stack(ranks).nanmean(0)
    matrix = torch.eye(size, dtype=torch.float64)
    matrix[row, column] = matrix[column, row] = mean
    return matrix
