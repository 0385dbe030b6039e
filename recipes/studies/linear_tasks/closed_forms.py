"""Linear tasks in closed form, each with one strength that the validation split chooses."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Regression, SyntheticData

#: Values of the one hyper-parameter of the closed forms. They cost nothing, so that there are many.
CLOSED_FORM_STRENGTHS = tuple(10 ** (exponent / 4) for exponent in range(-24, 13))

# Weights [T, F] for a strength. All are the minimum of the sum over the tasks of the mean squared error.


def ridge(train: Regression, strength: float) -> Tensor:
    """Each task alone, plus ``strength * sum_t |w_t|^2``."""
    inputs, targets = train.inputs, train.targets.unsqueeze(-1)
    gram = inputs.mT @ inputs / inputs.shape[1] + strength * torch.eye(inputs.shape[2], dtype=inputs.dtype)
    weights: Tensor = torch.linalg.solve(gram, inputs.mT @ targets / inputs.shape[1])
    return weights.squeeze(-1)


def pooled(train: Regression, strength: float) -> Tensor:
    """One regressor for the samples of all tasks, plus ``strength * |w|^2``."""
    together = Regression(train.inputs.flatten(0, 1).unsqueeze(0), train.targets.flatten().unsqueeze(0))
    return ridge(together, strength).expand(len(train.inputs), -1)


def mean_regularised(train: Regression, strength: float) -> Tensor:
    """RMTL: plus ``strength * sum_t |w_t - mean|^2`` (Evgeniou and Pontil 2004), with ``mean`` that of the ``w_t``."""
    tasks, samples, features = train.inputs.shape
    identity = torch.eye(features, dtype=train.inputs.dtype)
    centring = torch.eye(tasks, dtype=train.inputs.dtype) - 1 / tasks
    system = torch.block_diag(*(train.inputs.mT @ train.inputs / samples)) + strength * torch.kron(centring, identity)
    right = (train.inputs.mT @ train.targets.unsqueeze(-1) / samples).flatten()
    # Nothing holds the mean in directions that no task sees: there the smallest weights are taken.
    inverse: Tensor = torch.linalg.pinv(system, rtol=1e-12, hermitian=True)
    return (inverse @ right).view(tasks, features)


CLOSED_FORMS: dict[str, Callable[[Regression, float], Tensor]] = {
    "single_ridge": ridge,
    "mean_regularised": mean_regularised,
    "pooled": pooled,
}


def best_strength(key: str, data: SyntheticData) -> tuple[Tensor, list[float], Tensor]:
    """Of one of the closed forms: validation RMSE of each task, the strengths chosen, and the weights ``[T, F]``."""
    candidates = torch.stack([CLOSED_FORMS[key](data.train, strength) for strength in CLOSED_FORM_STRENGTHS])
    errors = data.validation.rmse(candidates)  # [S, T]
    tasks = torch.arange(errors.shape[1])
    # Ridge shares nothing, so each task has a strength of its own.
    best = errors.argmin(0) if key == "single_ridge" else errors.mean(1).argmin().expand(len(tasks))
    used = best if key == "single_ridge" else best[:1]
    chosen = [CLOSED_FORM_STRENGTHS[index] for index in used.tolist()]
    return errors[best, tasks], chosen, candidates[best, tasks]
