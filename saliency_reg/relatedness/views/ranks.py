"""Rank correlations between vectors of which some entries are unknown."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Of two pairs the rank correlation is always 1 or -1.
_LEAST_PAIRS = 3


def average_ranks(values: Tensor) -> Tensor:
    """Return the ranks ``[N]``, from 1, float64; equal values share the mean of their ranks."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks[inverse]


def spearman(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors ``[N]`` over the entries that both know.

    NaN where these are fewer than three, or where one vector is constant.
    """
    both = ~(first.isnan() | second.isnan())
    if int(both.sum()) < _LEAST_PAIRS:
        return math.nan
    one, other = (ranks - ranks.mean() for ranks in (average_ranks(first[both]), average_ranks(second[both])))
    norm = math.sqrt(float(one.square().sum()) * float(other.square().sum()))
    return max(-1.0, min(1.0, float((one * other).sum()) / norm)) if norm > 0 else math.nan


def rank_correlations_of(vectors: Tensor) -> Tensor:
    """Return ``[V, V]``, rank correlations between the rows of ``[V, N]``, each pair of rows where both are known."""
    count = len(vectors)
    found = torch.full((count, count), torch.nan, dtype=torch.float64)
    for i in range(count):
        for j in range(i, count):
            found[i, j] = found[j, i] = spearman(vectors[i], vectors[j])
    return found
