"""Methods compared over settings and seeds: tuned on validation with equally many trials, reported once on test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..methods.methods import BASELINE, METHODS, Method
from .results_file import CellFile

__all__ = ["FIRST_TUNING_SEED", "Cell", "Setting", "Study"]

FIRST_TUNING_SEED = 1000


@dataclass(frozen=True)
class Setting:
    """One table: what is the same for all its trainings.

    Attributes:
        key: a short name.
        label: for titles.
        values: everything else that a result depends on, as plain numbers and texts.
        methods: keys of those that are compared.
        grids: from what a method tunes to the values that are tried.
    """

    key: str
    label: str
    values: Mapping[str, Any]
    methods: tuple[str, ...]
    grids: Mapping[str, tuple[float, ...]] = field(hash=False, default_factory=dict)

    def trials(self, method: Method) -> tuple[float, ...]:
        """The values that are tried for this method."""
        return self.grids[method.parameter]


@dataclass(frozen=True)
class Cell:
    """One training; only a reported one sees the test split."""

    setting: Setting
    method: Method
    value: float
    seed: int
    reported: bool

    def to_dict(self) -> dict[str, Any]:
        """What its result depends on."""
        return {
            **self.setting.values,
            "method": self.method.key,
            "rule": self.method.rule,
            "metric": self.method.metric,
            "parameter": self.method.parameter,
            "value": self.value,
            "seed": self.seed,
            "reported": self.reported,
        }


#: From a cell to its result, or to ``None`` if the time is up.
TrainCell = Callable[[Cell], "tuple[Cell, dict[str, Any] | None, dict[str, Any]]"]
RunAll = Callable[[TrainCell, Sequence[Cell]], Iterable["tuple[Cell, dict[str, Any] | None, dict[str, Any]]"]]


class Study:
    """Plans the trainings, skips those whose results are there, and turns results into numbers at any time.

    Args:
        settings: in the order in which they are trained.
        seeds, tuning_seeds: of reported trainings and of trials.
        cells: the results.
    """

    def __init__(
        self, settings: Sequence[Setting], seeds: Sequence[int], tuning_seeds: Sequence[int], cells: CellFile
    ) -> None:
        self.settings = list(settings)
        self.seeds = list(seeds)
        self.tuning_seeds = list(tuning_seeds)
        self._cells = cells

    @property
    def trainings(self) -> int:
        """How many there are in all."""
        each = len(self.tuning_seeds)
        return sum(
            len(setting.trials(METHODS[key])) * each + len(self.seeds)
            for setting in self.settings
            for key in setting.methods
        )

    @property
    def done(self) -> int:
        """How many of them have a result."""
        trials = sum(self._cells.get(cell.to_dict()) is not None for own in self.settings for cell in self._trials(own))
        reported = sum(
            self._cells.get(cell.to_dict()) is not None for own in self.settings for cell in self._reported(own)
        )
        return trials + reported

    def run(self, run_all: RunAll, train: TrainCell) -> Iterator[Cell]:
        """Every training without a result, each one saved before it is yielded; ends early when the time is up."""
        for setting in self.settings:
            for cells in (self._trials, self._reported):
                for cell, result, about in run_all(train, self._missing(cells(setting))):
                    if result is not None:
                        self._cells.add(cell.to_dict(), result, about)
                        yield cell

    def chosen(self, setting: Setting, method: Method) -> float | None:
        """The value of the best mean validation score over the tuning seeds; ``None`` until all are tried."""
        means = self.tuning(setting, method)
        if len(means) < len(setting.trials(method)):
            return None
        return max(means, key=lambda value: means[value])

    def tuning(self, setting: Setting, method: Method) -> dict[float, float]:
        """The mean validation score of each value that all tuning seeds have tried."""
        found = {}
        for value in setting.trials(method):
            results = [self._result(setting, method, value, seed, reported=False) for seed in self.tuning_seeds]
            scores = [_score(result) for result in results if result is not None]
            if len(scores) == len(results):
                found[value] = statistics.fmean(scores)
        return found

    def reported(self, setting: Setting, method: Method) -> dict[int, dict[str, Any]]:
        """Results of the chosen value, by seed; those that are there."""
        value = self.chosen(setting, method)
        if value is None:
            return {}
        found = {seed: self._result(setting, method, value, seed, reported=True) for seed in self.seeds}
        return {seed: result for seed, result in found.items() if result is not None}

    def summary(self, setting: Setting, method: Method, metrics: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Mean and standard deviation over the seeds of each macro metric; empty without a result."""
        return _statistics([result["macro"] for result in self.reported(setting, method).values()], metrics)

    def difference(self, setting: Setting, method: Method, metrics: Sequence[str]) -> dict[str, tuple[float, float]]:
        """The same of the difference to hard sharing within a seed."""
        ours, theirs = self.reported(setting, method), self.reported(setting, METHODS[BASELINE])
        pairs = [(ours[seed]["macro"], theirs[seed]["macro"]) for seed in sorted(set(ours) & set(theirs))]
        rows = [{name: _number(a[name]) - _number(b[name]) for name in metrics} for a, b in pairs]
        return _statistics(rows, metrics)

    def _trials(self, setting: Setting) -> list[Cell]:
        return [
            Cell(setting, METHODS[key], value, seed, reported=False)
            for seed in self.tuning_seeds
            for key in setting.methods
            for value in setting.trials(METHODS[key])
        ]

    def _reported(self, setting: Setting) -> list[Cell]:
        # Seed by seed, so that a study that is stopped has all methods for the seeds it finished.
        chosen = {key: self.chosen(setting, METHODS[key]) for key in setting.methods}
        return [
            Cell(setting, METHODS[key], value, seed, reported=True)
            for seed in self.seeds
            for key, value in chosen.items()
            if value is not None
        ]

    def _missing(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if self._cells.get(cell.to_dict()) is None]

    def _result(
        self, setting: Setting, method: Method, value: float, seed: int, reported: bool
    ) -> dict[str, Any] | None:
        return self._cells.get(Cell(setting, method, value, seed, reported).to_dict())


def _score(result: Mapping[str, Any]) -> float:
    score = result["validation"]
    return -float("inf") if score is None else float(score)  # JSON has no infinity: a training that diverged


def _number(value: float | None) -> float:
    return math.nan if value is None else value  # JSON has no NaN, either


def _statistics(rows: Sequence[Mapping[str, float | None]], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    if not rows:
        return {}
    found = {}
    for name in names:
        values = [_number(row[name]) for row in rows]
        # Python 3.11's stdev stumbles on NaN.
        known = len(values) > 1 and not any(map(math.isnan, values))
        found[name] = statistics.fmean(values), statistics.stdev(values) if known else math.nan
    return found
