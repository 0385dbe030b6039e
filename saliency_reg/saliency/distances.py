"""Distances between the saliencies of tasks. A new metric is a function here and an entry in ``METRICS``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import NonFiniteError, ShapeError, WrongTypeError
from ..torch_tools import at_least_float32, check_choice, matmul_is_reduced, without_autocast

REDUCTIONS = ("mean", "sum")


def task_distances(
    saliencies: Tensor, *, metric: str = "l1", reduction: str = "mean", mask: Tensor | None = None
) -> Tensor:
    r"""Distance between the saliencies of every pair of tasks, reduced over the batch.

    ``D[i, j] = reduce_b dist(saliencies[i, b], saliencies[j, b])``, with all axes after the batch flattened.

    ========================  =======================================================================
    ``metric``                ``dist(x, y)``
    ========================  =======================================================================
    ``"l1"``                  ``sum |x - y|`` (the paper's)
    ``"l2"``                  ``sqrt(sum (x - y)^2)``
    ``"sqeuclidean"``         ``sum (x - y)^2``
    ``"cosine"``              ``1 - cos(x, y)``, in ``[0, 2]``
    ``"sqchordal"``           ``1 - cos(x, y)^2``, in ``[0, 1]``: blind to sign and scale, so a task and its
                              opposite are related too; no gradient at ``cos = 0`` and ``cos = +-1``
    ========================  =======================================================================

    Two zero saliencies are at distance 0 in every metric; with ``cosine`` and ``sqchordal`` a zero saliency is
    at distance 1 from any other. Gradients are finite where two saliencies are equal or zero; those of the angles
    grow like one over the size of the saliencies, and entries below the smallest normal number count as zero there.
    16-bit input is computed in float32. Memory grows with ``T*B*C + T*T*B``, never with ``T*T*B*C``.

    Bai and Zhao (KDD 2022), eq. 5: the distance of the regularizer. The authors' code sums over the batch
    (``reduction="sum"``); the default is the mean, so that a strength keeps its meaning when the batch grows.

    Args:
        saliencies: ``[T, B, ...]``, floating point, ``T >= 2``, ``B >= 1``.
        metric: one of the names above.
        reduction: ``"mean"`` or ``"sum"`` over the batch.
        mask: the one that the saliencies were taken with, ``[B]`` or ``[B, positions...]``: samples without a real position
            are no part of the mean.

    Returns:
        ``[T, T]``, symmetric, non-negative, with a zero diagonal.

    Raises:
        ConfigurationError: unknown ``metric`` or ``reduction``.
        WrongTypeError: ``saliencies`` is not a floating-point tensor.
        ShapeError: fewer than 3 axes, fewer than 2 tasks, an empty batch, or a mask of another batch.
        NonFiniteError: NaN or infinity in ``saliencies``.

    Example:
        >>> saliencies = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[-1.0, 0.0]]])  # [T=3, B=1, C=2]
        >>> task_distances(saliencies, metric="sqchordal")
        tensor([[0., 1., 0.],
                [1., 0., 1.],
                [0., 1., 0.]])
    """
    check_choice("metric", metric, tuple(METRICS))
    check_choice("reduction", reduction, REDUCTIONS)
    if not isinstance(saliencies, Tensor):
        raise WrongTypeError(
            f"saliencies must be one tensor [T, B, ...], found {type(saliencies).__name__}. "
            "Pass torch.stack([...]) to join a list of per-task saliencies."
        )
    if not saliencies.is_floating_point():
        raise WrongTypeError(f"saliencies must be floating point, found {saliencies.dtype}. Pass saliencies.float().")
    if saliencies.ndim < 3 or saliencies.shape[0] < 2 or saliencies.shape[1] < 1:
        raise ShapeError(
            f"saliencies must be [T, B, C] or [T, B, ...] with T >= 2 tasks and B >= 1 samples, found "
            f"{list(saliencies.shape)}. task_saliencies(outputs, features) returns this shape."
        )
    if not torch.isfinite(saliencies).all():
        raise NonFiniteError(
            f"saliencies hold {int((~torch.isfinite(saliencies)).sum())} NaN or infinite values. "
            "Find the task with torch.isfinite(saliencies).flatten(1).all(1)."
        )
    if mask is None:
        return pairwise_distances(saliencies, metric, reduction)
    if not isinstance(mask, Tensor) or mask.ndim < 1 or len(mask) != saliencies.shape[1]:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ShapeError(
            f"mask must be [{saliencies.shape[1]}] or [{saliencies.shape[1]}, positions...], found {found}."
        )
    real = (mask.to(saliencies.device) != 0).reshape(len(mask), -1).any(1)
    masked = torch.where(real.view(-1, *[1] * (saliencies.ndim - 2)), saliencies, torch.zeros_like(saliencies))
    return pairwise_distances(masked, metric, reduction, real)


def pairwise_distances(saliencies: Tensor, metric: str, reduction: str, real: Tensor | None = None) -> Tensor:
    """:func:`task_distances` without its checks: values that are not finite propagate.

    ``real`` ``[B]``: which samples count for the mean; the saliencies of the others are zeros.
    """
    with without_autocast(saliencies):
        saliencies = saliencies.to(at_least_float32(saliencies.dtype))
        distances = METRICS[metric](saliencies.flatten(2))
        if reduction == "mean":
            distances = distances / (saliencies.shape[1] if real is None else real.sum().clamp(min=1))
        # One triangle decides: exactly symmetric, exactly zero diagonal, and half of the gradient's rounding.
        upper = distances.triu(diagonal=1)
        return upper + upper.T


def _l2(x: Tensor) -> Tensor:
    # The matrix-multiply form loses digits for close points; cdist's gradient at distance 0 is 0, not NaN.
    return torch.cdist(x, x, p=2.0, compute_mode="donot_use_mm_for_euclid_dist")


def _sqeuclidean(x: Tensor) -> Tensor:
    # Centring over the tasks keeps the Gram form from cancelling when all tasks share a large common part.
    dtype = x.dtype
    if matmul_is_reduced():
        x = x.double()
    x = x - x.mean(1, keepdim=True)
    gram = x @ x.transpose(1, 2)
    norms = gram.diagonal(dim1=1, dim2=2)
    return (norms.unsqueeze(1) + norms.unsqueeze(2) - 2 * gram).clamp(min=0).to(dtype)


def _cosine(x: Tensor) -> Tensor:
    # Dividing by the largest entry first keeps the squares from under- or overflowing. The result does not
    # depend on that factor, so it needs no gradient.
    largest = x.detach().abs().amax(2, keepdim=True)
    zero = largest < torch.finfo(x.dtype).tiny  # NaN is not, and propagates
    x = x / torch.where(zero, torch.ones_like(largest), largest)
    square = (x * x).sum(2, keepdim=True)
    unit = torch.where(zero, torch.zeros_like(x), x * torch.where(zero, torch.ones_like(square), square).rsqrt())
    # 1 - cos = |u - v|^2 / 2 for unit vectors, which keeps digits when tasks agree; where exactly one of the
    # two is zero, that is 1/2 and the other half is added.
    one_is_zero = (zero != zero.transpose(1, 2)).to(x.dtype)
    return 0.5 * (_sqeuclidean(unit) + one_is_zero)


def _sqchordal(x: Tensor) -> Tensor:
    cosine_distance = _cosine(x)
    return (cosine_distance * (2 - cosine_distance)).clamp(min=0)


#: Numbers at a time on a CPU, so that they stay in its cache; but never fewer columns than are vectorised.
_ENTRIES = 20480
_COLUMNS = 64


class _SummedL1(torch.autograd.Function):
    # [T, B, F] -> [T, T]. Summed over the batch, the l1 distance is that of the joined vectors. torch.cdist(x, x) computes
    # each pair twice and in its backward four times; pdist does not, and is vectorised better, but on a GPU its backward
    # takes T*T*B*F numbers.

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        tasks = len(x)
        if not _by_columns(x):
            return torch.cdist(x.transpose(0, 1), x.transpose(0, 1), p=1.0).sum(0).triu(1)
        distances = x.new_zeros(tasks, tasks)
        row, column = torch.triu_indices(tasks, tasks, 1)
        total = x.new_zeros(len(row))
        for part in _parts(x):
            total += torch.nn.functional.pdist(part, p=1.0)
        distances[row, column] = total
        return distances

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        tasks = len(x)
        if _by_columns(x):
            row, column = torch.triu_indices(tasks, tasks, 1)
            per_pair = gradient[row, column].contiguous()
            # The derivative of l1 depends on signs alone: the distances that are asked for are not read.
            found = [torch.ops.aten._pdist_backward(per_pair, part, 1.0, per_pair) for part in _parts(x)]
            return torch.cat(found, 1).view(x.shape)
        inside = x.transpose(0, 1).contiguous()
        both = (gradient.triu(1) + gradient.triu(1).T).expand(len(inside), tasks, tasks).contiguous()
        result: Tensor = torch.ops.aten._cdist_backward(both, inside, inside, 1.0, both).transpose(0, 1)
        return result


def _by_columns(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _parts(x: Tensor) -> list[Tensor]:
    return [part.contiguous() for part in torch.split(x.flatten(1), max(_ENTRIES // len(x), _COLUMNS), dim=1)]


def _summed(distance: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda saliencies: distance(saliencies.transpose(0, 1)).sum(0)


#: Saliencies ``[T, B, F]`` to distances summed over the batch ``[T, T]``, of which the part above the diagonal counts.
METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": _SummedL1.apply,
    "l2": _summed(_l2),
    "sqeuclidean": _summed(_sqeuclidean),
    "cosine": _summed(_cosine),
    "sqchordal": _summed(_sqchordal),
}
#: Metrics whose values do not grow with the saliencies.
BOUNDED_METRICS = ("cosine", "sqchordal")
