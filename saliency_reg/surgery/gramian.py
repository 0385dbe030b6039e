"""Inner products and weighted sums of task gradients, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..tasks import spread
from ..torch_tools import Gradient, at_least_float32, matmul_is_reduced, state_dtype, without_autocast

#: Entries that are stacked at a time.
_CHUNK = 2**22


def gramian_over(parts: Iterable[Sequence[Gradient]], num_tasks: int, device: torch.device) -> Tensor:
    """Return ``[T, T]`` inner products of gradients that consist of several ``parts``, with T entries in each of them."""
    total = torch.zeros(num_tasks, num_tasks, dtype=state_dtype(device), device=device)
    for gradients in parts:
        if any(gradient is not None for gradient in gradients):
            total += gramian_of(gradients).to(device)
    return total


def gramian_of(gradients: Sequence[Gradient]) -> Tensor:
    """Return ``G[i, j] = <g_i, g_j>`` of T gradients of one tensor; ``None`` counts as zero, but one must be there.

    Products are taken in float32 or float64, never in 16 bits or TF32. ``[T, T]``, float64 where the device has it.
    """
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]
    found = [gradient for gradient in gradients if gradient is not None]
    device = found[0].device
    total = torch.zeros(len(found), len(found), dtype=state_dtype(device), device=device)
    for _, rows in _stacked(found):
        total += column_gramian(rows.T)
    return spread(total, present, len(gradients), 0.0)


def weighted_sum(gradients: Sequence[Gradient], weights: Tensor) -> Tensor:
    """Return ``sum_t w_t g_t`` in the gradients' own dtype, added up in at least float32; ``weights`` is ``[T]``."""
    present = [index for index, gradient in enumerate(gradients) if gradient is not None]
    found = [gradient for gradient in gradients if gradient is not None]
    kept = weights.to(found[0].device)
    if len(found) < len(gradients):
        kept = kept[present]
    result = torch.empty(found[0].shape, dtype=found[0].dtype, device=found[0].device)
    flat = result.view(-1)
    for place, rows in _stacked(found):
        flat[place] = row_sum(rows, kept).to(result.dtype)
    return result


def column_gramian(columns: Tensor) -> Tensor:
    """Return inner products of columns ``[N, T]``, never in TF32: ``[T, T]``, float64 where the device has it."""
    dtype = state_dtype(columns.device)
    with without_autocast(columns):
        columns = columns.to(dtype) if matmul_is_reduced() else columns
        return (columns.T @ columns).to(dtype)


def row_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_t w_t rows[t]``, never in TF32: ``[T, N], [T] -> [N]``."""
    weights = weights.to(rows.dtype)
    with without_autocast(rows):
        return (rows * weights.unsqueeze(1)).sum(0) if matmul_is_reduced() else weights @ rows


def _stacked(gradients: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the flattened gradients, one below the other: ``[T, entries]``."""
    dtype = at_least_float32(gradients[0].dtype)
    flat = [gradient.to_dense().reshape(-1) for gradient in gradients]  # those of embeddings may be sparse
    width = max(_CHUNK // len(flat), 1)
    for start in range(0, flat[0].numel(), width):
        place = slice(start, start + width)
        yield place, torch.stack([row[place].to(dtype) for row in flat])
