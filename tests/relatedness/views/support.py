"""Views made of random numbers, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saliency_reg import RelationViews
from saliency_reg.relatedness.views import VIEWS

NAN = float("nan")
HOSTILE = (
    '<script>alert("1")</script>',
    "a, \"quoted\", 'name'\nof two lines",
    "=1+1",
    "nul \x00 and bell \x07",
    "nul \x01 and bell \x07",
    "half \ud800 a pair",
    "&amp; ü \N{DOG FACE} $x_1$",
)


def random_matrices(count: int, seed: int = 0, parts: int = 0) -> dict[str, Tensor]:
    """``{view: [T, T]}``, or ``[S, T, T]``, within the range and with the diagonal of each view."""
    generator = torch.Generator().manual_seed(seed)
    shape = (parts, count, count) if parts else (count, count)
    found = {}
    for key, kind in VIEWS.items():
        matrix = torch.rand(shape, generator=generator, dtype=torch.float64)
        if kind.symmetric:
            matrix = (matrix + matrix.transpose(-1, -2)) / 2
        if kind.highest != 1:
            matrix = 5 * matrix - (0.0 if kind.lowest == 0 else 2.0)
        elif kind.lowest < 0:
            matrix = 2 * matrix - 1
        own = {"saliency_distance": 0.0, "relation_weights": 0.0, "tag": None}.get(key, 1.0)
        if own is not None:
            torch.diagonal(matrix, dim1=-2, dim2=-1).fill_(own)
        found[key] = matrix
    return found


def random_views(count: int, seed: int = 0, parts: int = 6, names: Sequence[str] | None = None, **fields: Any) -> Any:
    """All views of ``count`` tasks, all of them known."""
    counts = torch.randint(10, 500, (count, count), generator=torch.Generator().manual_seed(seed))
    given = {
        "tasks": tuple(names or (f"task {number}" for number in range(count))),
        "matrices": random_matrices(count, seed),
        "common_labels": torch.minimum(counts, counts.T),
        "trajectory": random_matrices(count, seed + 1, parts) if parts else {},
        "skill": torch.linspace(0.1, 0.9, count, dtype=torch.float64),
    }
    return RelationViews(**{**given, **fields})


def with_gaps(views: RelationViews, pairs: Sequence[tuple[int, int]], keys: Sequence[str] | None = None) -> Any:
    """The same views, with NaN for pairs of tasks."""
    matrices = {}
    for key, matrix in views.matrices.items():
        matrix = matrix.clone()
        for i, j in pairs if keys is None or key in keys else ():
            matrix[i, j] = matrix[j, i] = NAN
        matrices[key] = matrix
    return RelationViews(views.tasks, matrices, views.common_labels, views.trajectory, views.skill)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Equal bit for bit, with NaN in the same places."""
    if one is None or other is None:
        return one is other
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool(torch.equal(one.isnan(), other.isnan()))
        and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
    )
