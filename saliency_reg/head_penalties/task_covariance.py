"""The covariance of the tasks that MRN and MTRL learn, in closed form, on the CPU and in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_tools import state_dtype

#: Eigenvalues of a covariance are at least this part of their mean, also without shrinkage: with more tasks than weights
#: per task it would be singular.
LEAST_EIGENVALUE = 1e-3


def gramian(weights: Tensor) -> Tensor:
    """Return ``W W'``, ``[T, T]``, of weights ``[T, M]``."""
    precise = weights.detach().to(state_dtype(weights.device))
    return (precise @ precise.mT).to("cpu", torch.float64)


def covariance_of(gram: Tensor, kind: str, shrinkage: float) -> Tensor | None:
    """Return the covariance for the weights with this Gramian; ``None`` if they are all 0, or not finite.

    MRN: ``W W'`` with trace T. MTRL: ``(W W')^(1/2)`` with trace 1. Then ``(1 - g) S + g (tr S / T) I``.
    """
    if not bool(gram.isfinite().all()):
        return None
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    values = values.clamp(min=0)
    if kind == "mtrl":
        values = values.sqrt()
    mean = values.mean()
    if not float(mean) > 0:
        return None
    values = (1 - shrinkage) * values / mean + shrinkage
    values = values.clamp(min=LEAST_EIGENVALUE)
    values = values / values.mean() * initial_variance(kind, len(values))
    return _from_spectrum(values, vectors)


def initial_variance(kind: str, tasks: int) -> float:
    """Return the mean eigenvalue: the trace is T for MRN, 1 for MTRL."""
    return 1.0 if kind == "mrn" else 1.0 / tasks


def precision_of(covariance: Tensor) -> Tensor:
    """Return the inverse, ``[T, T]``, float64, on the CPU."""
    values, vectors = torch.linalg.eigh(covariance.detach().to("cpu", torch.float64))
    return _from_spectrum(1 / values, vectors)


def is_positive_definite(covariance: Tensor) -> bool:
    matrix = covariance.detach().to("cpu", torch.float64)
    symmetric = torch.allclose(matrix, matrix.mT, rtol=1e-4, atol=0)
    return bool(matrix.isfinite().all()) and symmetric and bool((torch.linalg.eigvalsh(matrix) > 0).all())


def correlation_of(covariance: Tensor) -> Tensor:
    """Return ``[T, T]`` in [-1, 1], with a diagonal of ones."""
    deviations = covariance.diagonal().sqrt()
    correlations = (covariance / deviations / deviations.unsqueeze(1)).clamp(-1, 1)
    return correlations.fill_diagonal_(1)


def _from_spectrum(values: Tensor, vectors: Tensor) -> Tensor:
    matrix = (vectors * values) @ vectors.mT
    return (matrix + matrix.mT) / 2
