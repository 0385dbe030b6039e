"""Inner products and weighted sums of task gradients, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..torch_tools.precision import at_least_float32, matmul_is_reduced, without_autocast
from ..torch_tools.state import state_dtype

__all__ = ["conflicting_share", "cosines", "gramian_of", "row_gramian", "row_sum", "spread", "weighted_sum"]

#: Entries that are stacked at a time.
_CHUNK = 2**22


def gramian_of(gradients: Sequence[Tensor | None]) -> Tensor:
    """``G[i, j] = <g_i, g_j>`` of T gradients with one shape; ``None`` counts as zero.

    Products are taken in float32 or float64, never in 16 bits or TF32. Returns ``[T, T]``, float64 where the device has it.
    """
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]
    found = [gradient for gradient in gradients if gradient is not None]
    device = found[0].device
    total = torch.zeros(len(found), len(found), dtype=state_dtype(device), device=device)
    for _, rows in _stacked(found):
        total += row_gramian(rows)
    return spread(total, present, len(gradients), 0.0)


def weighted_sum(gradients: Sequence[Tensor | None], weights: Tensor) -> Tensor:
    """``sum_t w_t g_t`` in the gradients' own dtype, added up in at least float32; ``weights`` is ``[T]``."""
    found = [gradient for gradient in gradients if gradient is not None]
    kept = weights.to(found[0].device)
    if len(found) < len(gradients):
        kept = kept[[index for index, gradient in enumerate(gradients) if gradient is not None]]
    result = torch.empty(found[0].shape, dtype=found[0].dtype, device=found[0].device)
    flat = result.view(-1)
    for place, rows in _stacked(found):
        flat[place] = row_sum(rows, kept).to(result.dtype)
    return result


def row_gramian(rows: Tensor) -> Tensor:
    """Inner products of rows ``[T, N]``, never in TF32: ``[T, T]``, float64 where the device has it."""
    dtype = state_dtype(rows.device)
    with without_autocast(rows):
        rows = rows.to(dtype) if matmul_is_reduced() else rows
        return (rows @ rows.T).to(dtype)


def row_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """``sum_t w_t rows[t]``: ``[T, N], [T] -> [N]``."""
    weights = weights.to(rows.dtype)
    with without_autocast(rows):
        return (rows * weights.unsqueeze(1)).sum(0) if matmul_is_reduced() else weights @ rows


def cosines(gramian: Tensor) -> Tensor:
    """``[T, T]`` cosines of the angles between task gradients; NaN for a zero gradient."""
    norms = gramian.diagonal().clamp(min=0).sqrt()
    norms = torch.where(norms > 0, norms, torch.full_like(norms, torch.nan))
    return (gramian / norms / norms.unsqueeze(1)).clamp(-1, 1)


def conflicting_share(gramian: Tensor) -> float:
    """How many of the pairs of gradients that are not zero have a negative product, in ``[0, 1]``; NaN without a pair."""
    row, column = torch.triu_indices(len(gramian), len(gramian), 1, device=gramian.device)
    norms = gramian.diagonal()
    counts = (norms[row] > 0) & (norms[column] > 0)
    pairs = int(counts.sum())
    return float((gramian[row, column][counts] < 0).sum()) / pairs if pairs else float("nan")


def spread(matrix: Tensor, present: Sequence[int], size: int, elsewhere: float) -> Tensor:
    """A matrix ``[t, t]`` among the tasks ``present``, or a vector ``[t]``, as one of all T."""
    if len(present) == size:
        return matrix
    full = torch.full((size,) * matrix.ndim, elsewhere, dtype=matrix.dtype, device=matrix.device)
    index = torch.tensor(list(present), device=matrix.device)
    full[index if matrix.ndim == 1 else (index.unsqueeze(1), index)] = matrix
    return full


def _stacked(gradients: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the flattened gradients, one below the other: ``[T, entries]``."""
    dtype = at_least_float32(gradients[0].dtype)
    flat = [gradient.reshape(-1) for gradient in gradients]
    width = max(_CHUNK // len(flat), 1)
    for start in range(0, flat[0].numel(), width):
        place = slice(start, start + width)
        yield place, torch.stack([row[place].to(dtype) for row in flat])
