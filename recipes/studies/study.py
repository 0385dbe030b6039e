"""Methods compared over settings and seeds: tuned on validation with equally many trials, reported once on test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..methods.methods import BASELINE, METHODS, Method
from ..runtime.errors import OptionError
from .results_file import ResultsFile
from .trials import Range, Space, count_of, trial_values

FIRST_TUNING_SEED = 1000
#: Of the bootstrap.
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Setting:
    """One table: what is the same for all its trainings.

    Attributes:
        key: a short name.
        label: for titles.
        values: everything else that a result depends on, as plain numbers and texts.
        methods: keys of those that are compared.
        spaces: values that are tried, by a method's key, or by what it tunes.
        decay_of_baseline: methods with a penalty have the weight decay that the baseline has chosen, and not one of the
            ``values``. Those that are not tuned always do, and those that say whose decay they have.
        decay_factor: what that weight decay is multiplied by, where the penalty does what decay would have to do.
    """

    key: str
    label: str
    values: Mapping[str, Any]
    methods: tuple[str, ...]
    spaces: Mapping[str, Space] = field(hash=False, default_factory=dict)
    decay_of_baseline: bool = False
    decay_factor: float = 1.0

    def parameter(self, method: Method) -> str:
        """What is tuned of this method: where the values name a ``penalty``, a share in place of a strength."""
        name = method.parameter
        # Shares are those of the saliency penalty.
        return name if method.rule is None else name.replace("strength", str(self.values.get("penalty", "strength")), 1)

    def space(self, method: Method) -> Space:
        """The values that are tried for this method; the only one of a method that is not tuned."""
        if method.fixed is not None:
            return (method.fixed,)
        return next(self.spaces[name] for name in self._names_of_space(method) if name in self.spaces)

    def has_space(self, method: Method) -> bool:
        """Whether there are values to try for this method."""
        return not method.tuned or any(name in self.spaces for name in self._names_of_space(method))

    def _names_of_space(self, method: Method) -> tuple[str, ...]:
        parameter = self.parameter(method)
        return method.key, parameter, parameter.partition(",")[0]

    def searched(self, trials: int) -> Setting:
        """The same, with so many trials of each method within the bounds of its grid.

        Raises:
            OptionError: a grid has no two values above 0.
        """
        spaces = dict(self.spaces)
        for name, space in self.spaces.items():
            if isinstance(space, Range) or len(space) == 1:
                continue
            known = sorted(value for value in space if value > 0)
            if len(known) < 2:
                raise OptionError(
                    f"there is nothing to search between the values {', '.join(f'{value:g}' for value in space)} of the "
                    f"{name}. Pass two values above 0, or leave --trials out."
                )
            spaces[name] = Range(known[0], known[-1], trials)
        return replace(self, spaces=spaces)


@dataclass(frozen=True)
class Cell:
    """One training; only a reported one sees the test split."""

    setting: Setting
    method: Method
    value: Any
    seed: int
    reported: bool

    def to_dict(self) -> dict[str, Any]:
        """What its result depends on."""
        return {
            **self.setting.values,
            "method": self.method.key,
            "rule": self.method.rule,
            "metric": self.method.metric,
            "parameter": self.setting.parameter(self.method),
            "value": self.value,
            "seed": self.seed,
            "reported": self.reported,
        }


@dataclass(frozen=True)
class Statistic:
    """Mean and standard deviation over the seeds, and the bounds of a 95 % interval of the mean by bootstrap; NaN where
    they are not known."""

    mean: float
    std: float
    low: float
    high: float


#: A cell, its result (``None`` if the time is up), and what else should be known about it.
Trained = tuple[Cell, "dict[str, Any] | None", dict[str, Any]]
TrainCell = Callable[[Cell], Trained]
RunAll = Callable[[TrainCell, Sequence[Cell]], Iterable[Trained]]


class Study:
    """Plans the trainings, skips those whose results are there, and turns results into numbers at any time.

    Args:
        settings: in the order in which they are trained.
        seeds, tuning_seeds: of reported trainings and of trials.
        results: those that are there.
        methods: by key.
        baseline: key of the method that others are compared with.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        seeds: Sequence[int],
        tuning_seeds: Sequence[int],
        results: ResultsFile,
        methods: Mapping[str, Method] = METHODS,
        baseline: str = BASELINE,
    ) -> None:
        self.settings = list(settings)
        self.seeds = list(seeds)
        self.tuning_seeds = list(tuning_seeds)
        self.results = results
        self.methods = methods
        self.baseline = baseline

    def methods_of(self, setting: Setting) -> list[Method]:
        """Those that are compared, in the order of the tables."""
        return [self.methods[key] for key in setting.methods]

    @property
    def trainings(self) -> int:
        """How many there are in all."""
        return sum(
            sum(count_of(setting.space(method)) for method in self._tuned(setting)) * len(self.tuning_seeds)
            + len(setting.methods) * len(self.seeds)
            for setting in self.settings
        )

    @property
    def done(self) -> int:
        """How many of them have a result."""
        cells = [cell for own in self.settings for cell in (*self._trials(own), *self._reported(own))]
        return len(cells) - len(self._missing(cells))

    def run(self, run_all: RunAll, train: TrainCell) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Every training without a result, each one saved before it is yielded; ends early when the time is up."""
        for setting in self.settings:
            for planned in (self._trials, self._reported):
                while missing := self._missing(planned(setting)):
                    for cell, result, about in run_all(train, missing):
                        if result is not None:
                            self.results.add(cell.to_dict(), result, about)
                            yield cell, result
                    if self._missing(missing):
                        return  # the time is up

    def chosen(self, setting: Setting, method: Method) -> Any:
        """The value of the best mean validation score over the tuning seeds, the first of equals; ``None`` until all are
        tried, and until the baseline has chosen if the method has its weight decay."""
        if self._placed(setting, method) is None:
            return None
        space = setting.space(method)
        if not count_of(space):
            return trial_values(space, {}.get)[0]
        found = self.tuning(setting, method)
        if len(found) < count_of(space):
            return None
        return max(found, key=lambda trial: trial[1])[0]

    def tuning(self, setting: Setting, method: Method) -> list[tuple[Any, float]]:
        """The values that all tuning seeds have tried, with their mean validation scores."""
        own = self._placed(setting, method)
        if own is None:
            return []
        found = [(value, self._validation(own, method, value)) for value in self._values(own, method)]
        return [(value, score) for value, score in found if score is not None]

    def reported(self, setting: Setting, method: Method) -> dict[int, dict[str, Any]]:
        """Results of the chosen value, by seed; those that are there."""
        value, own = self.chosen(setting, method), self._placed(setting, method)
        if value is None or own is None:
            return {}
        found = {seed: self._result(own, method, value, seed, reported=True) for seed in self.seeds}
        return {seed: result for seed, result in found.items() if result is not None}

    def summary(self, setting: Setting, method: Method, metrics: Sequence[str]) -> dict[str, Statistic]:
        """Statistics over the seeds of each macro metric; empty without a result."""
        return _statistics([result["macro"] for result in self.reported(setting, method).values()], metrics)

    def difference(
        self, setting: Setting, method: Method, metrics: Sequence[str], reference: Method | None = None
    ) -> dict[str, Statistic]:
        """The same of the difference to the baseline, or another method, within a seed; empty for itself, and without it."""
        other = self.baseline if reference is None else reference.key
        if other == method.key or other not in setting.methods:
            return {}
        ours, theirs = self.reported(setting, method), self.reported(setting, self.methods[other])
        pairs = [(ours[seed]["macro"], theirs[seed]["macro"]) for seed in sorted(set(ours) & set(theirs))]
        rows = [{name: _number(a.get(name)) - _number(b.get(name)) for name in metrics} for a, b in pairs]
        return _statistics(rows, metrics)

    def _decay_from(self, setting: Setting, method: Method) -> Method | None:
        """The method whose chosen weight decay this one has; ``None`` if it has one of its own."""
        if method.decay_of is not None:
            return self.methods[method.decay_of]
        baseline = self.methods.get(self.baseline)
        has_decay = baseline is not None and baseline.parameter == "weight decay"
        waits = method.penalty is not None and (setting.decay_of_baseline or not method.tuned)
        return baseline if has_decay and waits else None

    def _tuned(self, setting: Setting) -> list[Method]:
        """Those that are compared, and before them those whose weight decay one of them has."""
        methods = self.methods_of(setting)
        sources = (self._decay_from(setting, method) for method in methods)
        first = {own.key: own for own in sources if own is not None and own not in methods}
        return [*first.values(), *methods]

    def _placed(self, setting: Setting, method: Method) -> Setting | None:
        """The setting of the method's own trainings; ``None`` until its weight decay was chosen, where that is needed."""
        source = self._decay_from(setting, method)
        if source is None:
            return setting
        decay = self.chosen(setting, source)
        if decay is None:
            return None
        factor = setting.decay_factor if method.penalty is not None else 1.0
        return replace(setting, values={**setting.values, "weight_decay": factor * decay})

    def _values(self, setting: Setting, method: Method) -> list[Any]:
        return trial_values(setting.space(method), lambda value: self._validation(setting, method, value))

    def _validation(self, setting: Setting, method: Method, value: Any) -> float | None:
        results = [self._result(setting, method, value, seed, reported=False) for seed in self.tuning_seeds]
        scores = [_score(result) for result in results if result is not None]
        return statistics.fmean(scores) if len(scores) == len(results) else None

    def _trials(self, setting: Setting) -> list[Cell]:
        tuned = [method for method in self._tuned(setting) if count_of(setting.space(method))]
        placed = [(method, self._placed(setting, method)) for method in tuned]
        values = [(method, own, self._values(own, method)) for method, own in placed if own is not None]
        return [
            Cell(own, method, value, seed, reported=False)
            for seed in self.tuning_seeds
            for method, own, tried in values
            for value in tried
        ]

    def _reported(self, setting: Setting) -> list[Cell]:
        # Seed by seed, so that a study that is stopped has all methods for the seeds it finished.
        chosen = [
            (method, self._placed(setting, method), self.chosen(setting, method)) for method in self.methods_of(setting)
        ]
        return [
            Cell(own, method, value, seed, reported=True)
            for seed in self.seeds
            for method, own, value in chosen
            if own is not None and value is not None
        ]

    def _missing(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if self.results.get(cell.to_dict()) is None]

    def _result(self, setting: Setting, method: Method, value: Any, seed: int, reported: bool) -> dict[str, Any] | None:
        return self.results.get(Cell(setting, method, value, seed, reported).to_dict())


def _score(result: Mapping[str, Any]) -> float:
    score = result["validation"]
    return -math.inf if score is None else float(score)  # JSON has no infinity: a training that diverged


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON has no NaN, either


def _statistics(rows: Sequence[Mapping[str, float | None]], names: Sequence[str]) -> dict[str, Statistic]:
    if not rows:
        return {}
    found = {}
    for name in names:
        values = [_number(row.get(name)) for row in rows]
        # Python 3.11's stdev stumbles on NaN.
        known = len(values) > 1 and not any(map(math.isnan, values))
        deviation = statistics.stdev(values) if known else math.nan
        found[name] = Statistic(statistics.fmean(values), deviation, *(_interval(values) if known else (math.nan,) * 2))
    return found


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Of 95 % for the mean, by the percentiles of means over seeds that are drawn anew."""
    drawn = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    # In one order, so that the interval does not depend on that of the seeds.
    low, high = np.percentile(np.sort(values)[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)
