"""The mixed model that is usual for rows of groups: common effects, and deviations of each group from them (statsmodels)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.groups import GroupRows
from ...runtime.errors import need

#: With more inputs that vary within groups, there are random intercepts only: of so many slopes there are too many
#: covariances for an optimizer.
MOST_SLOPES = 8


@dataclass(frozen=True)
class GroupLines:
    """A linear function for each group: weights ``[T, D]`` and intercepts ``[T]``.

    Attributes:
        note: what was fitted.
    """

    weights: Tensor
    intercepts: Tensor
    note: str

    def for_all_groups(self, inputs: Tensor) -> Tensor:
        """Predictions ``[M, T]`` of rows ``[M, D]``."""
        return inputs @ self.weights.T.to(inputs) + self.intercepts.to(inputs)


def fit_mixed_model(rows: GroupRows, within: tuple[int, ...]) -> GroupLines:
    """Fit by REML, with random intercepts and slopes; with random intercepts alone where that fails.

    Args:
        rows: of each group.
        within: indices of the inputs that vary within groups, and can have random slopes.
    """
    groups, count, width = rows.inputs.shape
    inputs = rows.inputs.double().flatten(0, 1).numpy()
    targets = rows.targets.double().flatten().numpy()
    codes = np.repeat(np.arange(groups), count)
    columns = _independent(inputs)
    fixed = np.column_stack([np.ones(len(inputs)), inputs[:, columns]])
    slopes = [index for index in within if index in columns]
    why = f"{len(slopes)} inputs vary within groups, too many"
    if 0 < len(slopes) <= MOST_SLOPES:
        random = np.column_stack([np.ones(len(inputs)), inputs[:, slopes]])
        fitted, why = _fitted(targets, fixed, codes, random, ("lbfgs", "bfgs", "cg"))
        if fitted is not None:
            return _lines(fitted, columns, slopes, groups, width, "random intercepts and slopes")
    # A single variance: no gradient is needed, which may be singular where it vanishes.
    fitted, failure = _fitted(targets, fixed, codes, np.ones((len(inputs), 1)), ("powell",))
    note = f"random intercepts: {why} with slopes"
    if fitted is not None:
        return _lines(fitted, columns, [], groups, width, note)
    # No variance between groups: one line for all.
    solution = np.linalg.lstsq(fixed, targets, rcond=None)[0]
    weights = torch.zeros(groups, width, dtype=torch.float64)
    weights[:, columns] = torch.from_numpy(solution[1:])
    return GroupLines(weights, torch.full((groups,), float(solution[0])).double(), f"least squares: {why}, {failure}")


def _fitted(targets: Any, fixed: Any, codes: Any, random: Any, optimizers: tuple[str, ...]) -> tuple[Any, str]:
    """The first fit that converged to a covariance that is not singular; ``None`` and why where there is none."""
    model = need("statsmodels.regression.mixed_linear_model").MixedLM(targets, fixed, groups=codes, exog_re=random)
    why = ""
    for optimizer in optimizers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is seen from the outcome
            try:
                fitted = model.fit(reml=True, method=optimizer)
                if fitted.converged and all(np.isfinite(own).all() for own in fitted.random_effects.values()):
                    return fitted, ""
                why = "the fit did not converge"
            except (np.linalg.LinAlgError, ValueError) as error:
                why = f"the fit failed ({error})"
    return None, why


def _lines(fitted: Any, columns: list[int], slopes: list[int], groups: int, width: int, note: str) -> GroupLines:
    effects = np.stack([np.asarray(fitted.random_effects[group]) for group in range(groups)])
    weights = torch.zeros(groups, width, dtype=torch.float64)
    weights[:, columns] = torch.from_numpy(np.asarray(fitted.fe_params)[1:].copy())
    weights[:, slopes] += torch.from_numpy(effects[:, 1:].copy())
    return GroupLines(weights, torch.from_numpy(effects[:, 0] + np.asarray(fitted.fe_params)[0]), note)


def _independent(inputs: Any) -> list[int]:
    """Columns that the ones before them, and the intercept, do not give."""
    chosen: list[int] = []
    kept = np.ones((len(inputs), 1))
    for index in range(inputs.shape[1]):
        tried = np.column_stack([kept, inputs[:, index]])
        if np.linalg.matrix_rank(tried) == tried.shape[1]:
            chosen.append(index)
            kept = tried
    return chosen
