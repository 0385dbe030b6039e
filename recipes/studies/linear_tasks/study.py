"""Plans the trainings of the synthetic comparison, collects them, and turns them into plain numbers at any time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .fits import Fitted, Job
from .methods import SHARED_BASELINE, SINGLE_TASK, Method, Setting
from .problem import FACTORS, TASKS

__all__ = ["Study", "relation_quality"]


class Study:
    """Tunes every method on validation with seeds of their own, then reports on test over other seeds."""

    def __init__(
        self, methods: Sequence[Method], trials: int, tuning_seeds: Sequence[int], seeds: Sequence[int]
    ) -> None:
        self.methods = list(methods)
        self.tuning_seeds = list(tuning_seeds)
        self.seeds = list(seeds)
        self.trials: dict[str, dict[Setting, list[Fitted]]] = {
            method.key: {setting: [] for setting in _spread(method.settings, trials)} for method in methods
        }
        self.reported: dict[str, dict[int, Fitted]] = {method.key: {} for method in methods}

    def run(self, run_all: Callable[[Sequence[Job]], Iterator[Fitted]]) -> Iterator[Fitted]:
        """All trainings, each one collected before it is yielded: first the trials, then the reported ones."""
        trials = [
            Job(method, setting, seed, reported=False)
            for seed in self.tuning_seeds
            for method in self.methods
            for setting in self.trials[method.key]
        ]
        for fitted in run_all(trials):
            self.trials[fitted.job.method.key][fitted.job.setting].append(fitted)
            yield fitted
        # Seed by seed, so that a run that is stopped has all methods for the seeds it finished.
        reported = [
            Job(method, self.chosen(method), seed, reported=True) for seed in self.seeds for method in self.methods
        ]
        for fitted in run_all(reported):
            self.reported[fitted.job.method.key][fitted.job.seed] = fitted
            yield fitted

    @property
    def trainings(self) -> int:
        """How many there are in all."""
        return sum(map(len, self.trials.values())) * len(self.tuning_seeds) + len(self.methods) * len(self.seeds)

    def chosen(self, method: Method) -> Setting:
        """The lowest validation RMSE, mean over the tuning seeds; the first of equals."""
        trials = self.trials[method.key]
        return min(trials, key=lambda setting: _mean_validation(trials[setting]), default=Setting())

    def best_single_task(self) -> str | None:
        """The single-task method with the lowest test RMSE: the hardest one to beat."""
        found = [key for key in SINGLE_TASK if self.reported.get(key)]
        return min(found, key=lambda key: statistics.fmean(map(_mean_test, self.reported[key].values())), default=None)

    def to_dict(self) -> dict[str, Any]:
        """What is known so far, as plain numbers."""
        baseline = self.best_single_task()
        return {
            "best_single_task": baseline,
            "methods": {method.key: self._method(method, baseline) for method in self.methods},
            "difference_to_shared_hard_sharing": self._differences(),
            "relations": {method.key: relations for method in self.methods if (relations := self._relations(method))},
        }

    def _method(self, method: Method, baseline: str | None) -> dict[str, Any]:
        trials = self.trials[method.key]
        tuned = bool(trials) and all(len(done) == len(self.tuning_seeds) for done in trials.values())
        return {
            "label": method.label,
            "tuning": {
                "chosen": str(self.chosen(method)) if tuned else None,
                "trials": [
                    {
                        "setting": str(setting),
                        "validation_rmse": _mean_validation(done),
                        "per_seed": [fitted.validation_rmse for fitted in done],
                    }
                    for setting, done in trials.items()
                    if done
                ],
            },
            "per_seed": [
                {
                    "seed": seed,
                    "rmse": _mean_test(fitted),
                    "rmse_per_task": fitted.test_rmse,
                    "validation_rmse": fitted.validation_rmse,
                    "best_steps": fitted.best_steps,
                    "chosen": fitted.chosen,
                    "error_inside": statistics.fmean(fitted.error_inside),
                    "error_outside": statistics.fmean(fitted.error_outside),
                }
                for seed, fitted in self.reported[method.key].items()
            ],
            "summary": self._summary(method, baseline),
        }

    def _summary(self, method: Method, baseline: str | None) -> dict[str, Any] | None:
        reported = self.reported[method.key]
        if not reported:
            return None
        summary: dict[str, Any] = {
            "rmse": _statistic([_mean_test(fitted) for fitted in reported.values()]),
            "error_inside": _statistic([statistics.fmean(fitted.error_inside) for fitted in reported.values()]),
            "error_outside": _statistic([statistics.fmean(fitted.error_outside) for fitted in reported.values()]),
        }
        theirs = {} if baseline is None else self.reported[baseline]
        both = [seed for seed in reported if seed in theirs]
        if both:
            ours_mean = statistics.fmean(_mean_test(reported[seed]) for seed in both)
            theirs_mean = statistics.fmean(_mean_test(theirs[seed]) for seed in both)
            summary["ratio"] = ours_mean / theirs_mean
            per_seed = [_mean_test(reported[seed]) / _mean_test(theirs[seed]) for seed in both]
            summary["worst_ratio"] = max(per_seed)
            ours, base = (torch.tensor([fits[seed].test_rmse for seed in both]) for fits in (reported, theirs))
            quartiles = (100 * (1 - ours / base)).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0).tolist()
            summary["improvement_percent"] = dict(zip(("lower_quartile", "median", "upper_quartile"), quartiles))
        return summary

    def _differences(self) -> dict[str, Any]:
        """What surgery and SRDML change in the RMSE with a shared layer, within each seed."""
        theirs = self.reported.get(SHARED_BASELINE, {})
        differences = {}
        for method in self.methods:
            ours = self.reported[method.key]
            seeds = [seed for seed in ours if seed in theirs]
            if method.shared_layer and method.key != SHARED_BASELINE and seeds:
                per_seed = [_mean_test(ours[seed]) - _mean_test(theirs[seed]) for seed in seeds]
                differences[method.key] = {"seeds": seeds, "per_seed": per_seed, "summary": _statistic(per_seed)}
        return differences

    def _relations(self, method: Method) -> dict[str, Any]:
        found = {seed: fit.relations for seed, fit in self.reported[method.key].items() if fit.relations}
        if not found:
            return {}
        stack = torch.tensor(list(found.values()), dtype=torch.float64)
        return {
            "tasks": list(TASKS),
            "seeds": list(found),
            "mean": stack.mean(0).tolist(),
            "per_seed": stack.tolist(),
            "quality_of_mean": relation_quality(stack.mean(0)),
            "quality_per_seed": [relation_quality(matrix) for matrix in stack],
        }


def relation_quality(matrix: Tensor) -> dict[str, float]:
    """How learned relations ``[T, T]`` order the pairs.

    ``twins_on_top``: how many of the pairs with equal weights are among as many strongest pairs.
    ``same_base_auc``: the probability that a pair of equal signs is stronger than one of opposite signs.
    """
    row, column = torch.triu_indices(len(TASKS), len(TASKS), 1)
    factors, weights = torch.tensor(FACTORS, dtype=torch.float64), matrix[row, column]
    twins = factors[row] == factors[column]
    # A tie counts against the twins: only pairs above all others are surely on top.
    others = weights[~twins].sort(descending=True).values
    rank = (others >= weights[twins].unsqueeze(1)).sum(1) + (weights[twins] > weights[twins].unsqueeze(1)).sum(1)
    same, opposite = (
        weights[chosen] for chosen in (factors[row] * factors[column] > 0, factors[row] * factors[column] < 0)
    )
    difference = same.unsqueeze(1) - opposite
    area = ((difference > 0).double() + 0.5 * (difference == 0).double()).mean()
    return {"twins_on_top": float((rank < twins.sum()).sum()), "same_base_auc": float(area)}


def _spread(settings: Sequence[Setting], most: int) -> list[Setting]:
    """At most so many of the settings, evenly spread over the grid."""
    if len(settings) <= most:
        return list(settings)
    return [settings[int((index + 0.5) * len(settings) / most)] for index in range(most)]


def _mean_test(fitted: Fitted) -> float:
    return statistics.fmean(fitted.test_rmse)


def _mean_validation(done: Sequence[Fitted]) -> float:
    return statistics.fmean(fitted.validation_rmse for fitted in done)


def _statistic(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
