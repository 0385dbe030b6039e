"""The method written down as plainly as possible: loops over samples, tasks, positions and pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def slow_saliency(output: Tensor, feature: Tensor, scalar: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient of one sample's scalar with respect to its feature map ``[1, ...]``, differentiable; ``[...]``."""
    (gradient,) = torch.autograd.grad(scalar(output), feature, create_graph=True, allow_unused=False)
    return gradient[0]


def slow_pool(gradient: Tensor, pool: str | None, channel_axis: int, mask: Tensor | None = None) -> Tensor:
    """``gradient`` is one sample's, without batch axis; ``channel_axis`` is counted without it, too."""
    by_position = gradient.movedim(channel_axis, -1)
    channels = by_position.shape[-1]
    positions = by_position.reshape(-1, channels)
    keep = [True] * len(positions) if mask is None else [bool(value) for value in mask.reshape(-1)]
    if pool is None:
        rows = [row if kept else torch.zeros_like(row) for row, kept in zip(positions, keep)]
        return torch.stack(rows).reshape(by_position.shape).movedim(-1, channel_axis)
    kept_rows = [row for row, kept in zip(positions, keep) if kept]
    total = sum(kept_rows, start=torch.zeros_like(positions[0]))
    return total / max(len(kept_rows), 1) if pool == "mean" else total


def slow_distance(x: Tensor, y: Tensor, metric: str) -> Tensor:
    x, y = x.reshape(-1), y.reshape(-1)
    if metric == "l1":
        return (x - y).abs().sum()
    if metric == "sqeuclidean":
        return ((x - y) ** 2).sum()
    if metric == "l2":
        square = ((x - y) ** 2).sum()
        return square.sqrt() if square > 0 else (x - y).sum() * 0
    x_is_zero, y_is_zero = not bool(x.any()), not bool(y.any())
    if x_is_zero and y_is_zero:
        return (x - y).sum() * 0
    if x_is_zero or y_is_zero:
        return (x - y).sum() * 0 + 1
    cosine = (x @ y) / (x @ x).sqrt() / (y @ y).sqrt()
    return 1 - cosine if metric == "cosine" else 1 - cosine**2


def slow_distances(saliencies: Sequence[Sequence[Tensor]], metric: str, reduction: str) -> Tensor:
    """``saliencies[t][b]``; returns ``[T, T]``."""
    tasks, samples = len(saliencies), len(saliencies[0])
    rows = []
    for i in range(tasks):
        row = []
        for j in range(tasks):
            if i == j:
                row.append(torch.zeros((), dtype=saliencies[0][0].dtype))
                continue
            parts = [slow_distance(saliencies[i][b], saliencies[j][b], metric) for b in range(samples)]
            total = sum(parts[1:], start=parts[0])
            row.append(total / samples if reduction == "mean" else total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def slow_penalty(distances: Tensor, weights: Tensor) -> Tensor:
    total = torch.zeros((), dtype=distances.dtype)
    for i in range(len(distances)):
        for j in range(i + 1, len(distances)):
            total = total + weights[i, j] * distances[i, j]
    return total


def slow_simplex_projection(vector: Tensor, mass: float) -> Tensor:
    """Bisection on the threshold of ``max(vector - theta, 0)``."""
    low, high = float(vector.min()) - mass, float(vector.max())
    for _ in range(200):
        middle = (low + high) / 2
        if float((vector - middle).clamp(min=0).sum()) > mass:
            low = middle
        else:
            high = middle
    return (vector - (low + high) / 2).clamp(min=0)


def slow_authors_coefficients(steps: Sequence[list[list[float]]], strength: float, rate: float) -> list[list[float]]:
    """The published update of ``c`` in Python floats; ``steps[k][i][j]`` is the distance at step ``k + 1``."""
    tasks = len(steps[0])
    pairs = [(i, j) for i in range(tasks) for j in range(i + 1, tasks)]
    c = dict.fromkeys(pairs, 1.0)
    for k, distances in enumerate(steps, start=1):
        t = 3 * k
        total = sum(c.values())
        weighted = sum(c[i, j] * distances[i][j] for i, j in pairs)
        new = {}
        for i, j in pairs:
            gradient = strength * (distances[i][j] / total - weighted / total**2)
            m = (1 - 0.9) * gradient
            v = (1 - 0.999) * gradient * gradient
            step_size = rate * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            new[i, j] = max(c[i, j] - step_size * m / (math.sqrt(v) + 1e-7), 0.0)
        c = new
    return [[c[i, j] if i < j else c[j, i] if j < i else 0.0 for j in range(tasks)] for i in range(tasks)]
