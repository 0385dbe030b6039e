"""The methods that learn the linear tasks, and the values that are tried for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...methods.methods import Method, Methods
from ...methods.surgeries import MGDA_UB, PCGRAD, PCGRAD_PARAMETERS, Surgery


@dataclass(frozen=True)
class LinearMethod(Method):
    """A way to learn the tasks, with a linear layer before them if it is ``shared``.

    Attributes:
        grid: hyper-parameters by name, for each trial. Closed forms have none: they choose on validation for every seed.
    """

    grid: tuple[dict[str, float], ...] = ({},)

    @property
    def parameter(self) -> str:
        """Nothing: values name what they tune."""
        return ""


def _grid(**values: Sequence[float]) -> tuple[dict[str, float], ...]:
    """All combinations; the first name changes fastest."""
    combinations = itertools.product(*reversed(values.values()))
    return tuple(dict(zip(values, reversed(combination))) for combination in combinations)


def _half_decades(first: int) -> tuple[float, ...]:
    """Twelve values from ``10 ** first`` on."""
    return tuple(factor * 10.0 ** (first + decade) for decade in range(6) for factor in (1, 3))


_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_LEARNING_RATES = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5)


def _srdml(
    name: str,
    metric: str,
    uniform: Sequence[float],
    strengths: Sequence[float],
    temperatures: Sequence[float],
    projected: Sequence[float],
) -> Iterator[LinearMethod]:
    """With every relation rule, and without a shared layer."""
    for key, rule, label, grid in (
        (name, "entropic", "entropic", _grid(strength=strengths, temperature=temperatures)),
        (f"{name}_projected", "projected", "projected", _grid(strength=strengths, relation_rate=projected)),
        (f"{name}_authors", "authors", "authors", _grid(strength=strengths, relation_rate=_RATES)),
        (f"{name}_uniform", "fixed", "uniform weights", _grid(strength=uniform)),
    ):
        earlier = (f"{metric}_{rule}",)
        yield LinearMethod(key, f"SRDML, {metric}, {label}", rule, metric, None, False, earlier, grid)


def _with_layer(
    key: str, label: str, earlier: str, rule: str | None = None, surgery: Surgery | None = None
) -> LinearMethod:
    """With a shared layer; grids laid out by validation errors of the seeds 1000 to 1002, at more values than these."""
    grid = _grid(learning_rate=(0.002, 0.003, 0.005, 0.015))
    if rule is not None:
        grid = _grid(strength=(3.0, 10.0), temperature=(0.2, 0.5), learning_rate=(0.2,))
    return LinearMethod(key, f"Shared layer, {label}", rule, surgery=surgery, earlier=(earlier,), grid=grid)


_ALL = (
    LinearMethod(
        "single_task",
        "Single-task, early stopping",
        shared=False,
        earlier=("single_adam",),
        grid=_grid(learning_rate=_LEARNING_RATES),
    ),
    LinearMethod("single_ridge", "Single-task, ridge", shared=False),
    LinearMethod("mean_regularised", "Mean-regularised (RMTL)", shared=False),
    LinearMethod("pooled", "One pooled regressor", shared=False),
    *_srdml("srdml", "l1", _half_decades(-3), (1.0, 3.0, 10.0), (0.05, 0.07, 0.1, 0.2), _RATES),
    *_srdml(
        "srdml_sqchordal",
        "sqchordal",
        _half_decades(-1),
        (100.0, 300.0, 1000.0),
        (0.1, 0.3, 1.0, 3.0),
        (1e-7, 1e-6, 1e-5, 1e-4),
    ),
    _with_layer("hard_sharing", "hard sharing", "shared_hard"),
    _with_layer("pcgrad", PCGRAD.label, "shared_pcgrad_feature", surgery=PCGRAD),
    _with_layer("pcgrad@parameters", PCGRAD_PARAMETERS.label, "shared_pcgrad_parameters", surgery=PCGRAD_PARAMETERS),
    _with_layer("mgda_ub", MGDA_UB.label, "shared_mgda_ub", surgery=MGDA_UB),
    _with_layer("srdml_shared_layer", "SRDML, l1, entropic", "shared_l1_entropic", "entropic"),
    _with_layer("srdml+pcgrad", f"SRDML w/ {PCGRAD.label}", "shared_srdml_pcgrad_feature", "entropic", PCGRAD),
    _with_layer(
        "srdml+pcgrad@parameters",
        f"SRDML w/ {PCGRAD_PARAMETERS.label}",
        "shared_srdml_pcgrad_parameters",
        "entropic",
        PCGRAD_PARAMETERS,
    ),
)
METHODS = Methods()
for _method in _ALL:
    METHODS.add(_method)
SINGLE_TASK = ("single_task", "single_ridge")
MOST_TRIALS = max(len(method.grid) for method in _ALL)


def grids(trials: int = MOST_TRIALS) -> dict[str, tuple[dict[str, float], ...]]:
    """At most so many values for each method, evenly spread over its grid."""
    return {method.key: _spread(method.grid, trials) for method in _ALL}


def _spread(grid: tuple[dict[str, float], ...], most: int) -> tuple[dict[str, float], ...]:
    if len(grid) <= most:
        return grid
    return tuple(grid[int((index + 0.5) * len(grid) / most)] for index in range(most))
