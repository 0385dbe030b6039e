"""The values of its one hyper-parameter that a method tries, as many as every other method."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..runtime.errors import need


@dataclass(frozen=True)
class Range:
    """So many values between two bounds, each chosen by Optuna from the scores of those before it.

    Attributes:
        low, high: bounds, above 0; values are spread over their logarithm.
        count: how many are tried.
    """

    low: float
    high: float
    count: int


Space = Sequence[Any] | Range


def trial_values(space: Space, score_of: Callable[[Any], float | None]) -> list[Any]:
    """Return the values to try: all of a grid, or as many of a range as the scores so far allow.

    The same scores give the same values, so that trials of an earlier run are found again.

    Args:
        space: a grid, or a range.
        score_of: validation score of a value, more is better; ``None`` if it was not tried yet.
    """
    if not isinstance(space, Range):
        return [space[index] for index in _whole_grid(len(space))]
    study = _optuna_study(need("optuna").samplers.TPESampler(seed=0, n_startup_trials=max(2, space.count // 3)))
    values: list[float] = []
    for _ in range(space.count):
        trial = study.ask()
        values.append(trial.suggest_float("value", space.low, space.high, log=True))
        score = score_of(values[-1])
        if score is None:
            break
        study.tell(trial, max(score, -1e30))  # of a training that diverged
    return values


def count_of(space: Space) -> int:
    """How many values are tried in the end; a single one needs no trial."""
    count = space.count if isinstance(space, Range) else len(space)
    return count if count > 1 else 0


@functools.cache
def _whole_grid(size: int) -> tuple[int, ...]:
    study = _optuna_study(need("optuna").samplers.GridSampler({"index": list(range(size))}, seed=0))
    return tuple(sorted(study.ask().suggest_int("index", 0, size - 1) for _ in range(size)))


def _optuna_study(sampler: Any) -> Any:
    optuna = need("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", sampler=sampler)
