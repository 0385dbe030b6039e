"""Pairwise l1 distances between tasks, added up over the batch: most of what a penalty with many tasks costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["summed_l1"]

#: Numbers at a time on a CPU, so that they stay in its cache.
_ENTRIES = 20480


def summed_l1(x: Tensor) -> Tensor:
    """``[T, B, F] -> [T, T]``: ``sum_b |x_i[b] - x_j[b]|`` for ``i < j``, and zero elsewhere. Differentiable once."""
    distances: Tensor = _SummedL1.apply(x)
    return distances


class _SummedL1(torch.autograd.Function):
    # Summed over the batch, the l1 distance is that of the joined vectors. torch.cdist(x, x) computes each pair twice and in
    # its backward four times; pdist does not, and is vectorised better, but on a GPU its backward takes T*T*B*F numbers.

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """``[T, T]``: the distance of each pair, above the diagonal."""
        ctx.save_for_backward(x)
        tasks = len(x)
        distances = x.new_zeros(tasks, tasks)
        if _by_columns(x):
            row, column = torch.triu_indices(tasks, tasks, 1)
            total = x.new_zeros(len(row))
            for part in _parts(x.flatten(1)):
                total += torch.nn.functional.pdist(part, p=1.0)
            distances[row, column] = total
            return distances
        return torch.cdist(x.transpose(0, 1), x.transpose(0, 1), p=1.0).sum(0).triu(1)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sums of signs, weighed by the gradients of the pairs."""
        (x,) = ctx.saved_tensors
        tasks = len(x)
        if _by_columns(x):
            row, column = torch.triu_indices(tasks, tasks, 1)
            per_pair = gradient[row, column].contiguous()
            # The derivative of l1 depends on signs alone: the distances that are asked for are not read.
            found = [torch.ops.aten._pdist_backward(per_pair, part, 1.0, per_pair) for part in _parts(x.flatten(1))]
            return torch.cat(found, 1).view(x.shape)
        inside = x.transpose(0, 1).contiguous()
        both = (gradient.triu(1) + gradient.triu(1).T).expand(len(inside), tasks, tasks).contiguous()
        result: Tensor = torch.ops.aten._cdist_backward(both, inside, inside, 1.0, both).transpose(0, 1)
        return result


def _by_columns(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _parts(x: Tensor) -> Iterator[Tensor]:
    for part in torch.split(x, max(_ENTRIES // len(x), 1), dim=1):
        yield part.contiguous()
