"""Linear tasks in closed form, each with one strength that the validation split chooses."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .problem import Regression, SyntheticData

#: Values of the one hyper-parameter of the closed forms. They cost nothing, so that there are many.
CLOSED_FORM_STRENGTHS = tuple(10 ** (exponent / 4) for exponent in range(-24, 13))


def ridge(train: Regression, strength: float) -> Tensor:
    """Weights ``[T, F]`` of the least sum of mean squared errors over the tasks, plus ``strength * sum_t |w_t|^2``."""
    inputs, targets = train.inputs, train.targets.unsqueeze(-1)
    gram = inputs.mT @ inputs / inputs.shape[1] + strength * torch.eye(inputs.shape[2], dtype=inputs.dtype)
    weights: Tensor = torch.linalg.solve(gram, inputs.mT @ targets / inputs.shape[1])
    return weights.squeeze(-1)


def pooled(train: Regression, strength: float) -> Tensor:
    """The same of one regressor for the samples of all tasks, plus ``strength * |w|^2``."""
    together = Regression(train.inputs.flatten(0, 1).unsqueeze(0), train.targets.flatten().unsqueeze(0))
    return ridge(together, strength).expand(len(train.inputs), -1)


def mean_regularised(train: Regression, strength: float) -> Tensor:
    """The same of RMTL, plus ``strength * sum_t |w_t - mean|^2`` with the mean of the ``w_t`` (Evgeniou and Pontil 2004)."""
    tasks, samples, features = train.inputs.shape
    identity = torch.eye(features, dtype=train.inputs.dtype)
    centring = torch.eye(tasks, dtype=train.inputs.dtype) - 1 / tasks
    system = torch.block_diag(*(train.inputs.mT @ train.inputs / samples)) + strength * torch.kron(centring, identity)
    right = (train.inputs.mT @ train.targets.unsqueeze(-1) / samples).flatten()
    # Nothing holds the mean in directions that no task sees: there the smallest weights are taken.
    inverse: Tensor = torch.linalg.pinv(system, rtol=1e-12, hermitian=True)
    return (inverse @ right).view(tasks, features)


_Form = Callable[[Regression, float], Tensor]
CLOSED_FORMS: dict[str, _Form] = {"single_ridge": ridge, "mean_regularised": mean_regularised, "pooled": pooled}


def best_strength(key: str, data: SyntheticData) -> tuple[Tensor, list[float], Tensor]:
    """Of one of the closed forms: validation RMSE of each task, the strengths chosen, and the weights ``[T, F]``."""
    candidates = torch.stack([CLOSED_FORMS[key](data.train, strength) for strength in CLOSED_FORM_STRENGTHS])
    errors = data.validation.rmse(candidates)  # [S, T]
    tasks = torch.arange(errors.shape[1])
    apart = key == "single_ridge"  # it shares nothing, so each task has a strength of its own
    best = errors.argmin(0) if apart else errors.mean(1).argmin().expand(len(tasks))
    chosen = [CLOSED_FORM_STRENGTHS[index] for index in (best if apart else best[:1]).tolist()]
    return errors[best, tasks], chosen, candidates[best, tasks]
