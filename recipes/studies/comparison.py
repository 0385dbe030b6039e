"""Methods compared fairly: tuned on validation with equally many trials each, reported on test over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..methods.attach import MGDA_UB, MGDA_UB_UNIT, PCGRAD
from ..training.digit_metrics import METRICS, mean_and_deviation, paired_difference, summarise
from .digit_training import Job, Method, Trained

__all__ = ["BASELINE", "METHODS", "Comparison"]

BASELINE = "hard_sharing"

METHODS = {
    method.key: method
    for method in (
        Method("single_task", "Single-task", shared=False),
        Method(BASELINE, "Hard sharing"),
        *(Method(key, surgery.label, surgery=surgery) for key, surgery in PCGRAD.items()),
        Method("mgda_ub", MGDA_UB.label, surgery=MGDA_UB),
        Method("mgda_ub_unit", MGDA_UB_UNIT.label, surgery=MGDA_UB_UNIT),
        Method("srdml_projected", "SRDML, projected", rule="projected"),
        Method("srdml_entropic", "SRDML, entropic", rule="entropic"),
        Method("srdml_authors", "SRDML, authors", rule="authors"),
        *(
            Method(f"srdml_{key}", f"SRDML w/ {surgery.label}", rule="entropic", surgery=surgery)
            for key, surgery in PCGRAD.items()
        ),
    )
}


class Comparison:
    """Plans the trainings, collects what they leave, and turns it into plain numbers at any time."""

    def __init__(
        self,
        methods: Sequence[Method],
        grids: Mapping[str, Sequence[float]],
        tuning_seeds: Sequence[int],
        seeds: Sequence[int],
        tasks: Sequence[str],
    ) -> None:
        self.methods = list(methods)
        self.grids = {method.key: list(grids[method.parameter]) for method in methods}
        self.tuning_seeds = list(tuning_seeds)
        self.seeds = list(seeds)
        self.tasks = list(tasks)
        self.trials: dict[str, dict[float, list[Trained]]] = {
            key: {value: [] for value in grid} for key, grid in self.grids.items()
        }
        self.reported: dict[str, dict[int, Trained]] = {method.key: {} for method in methods}

    def run(self, run_all: Callable[[Sequence[Job]], Iterator[Trained]]) -> Iterator[Trained]:
        """All trainings, each one collected before it is yielded: first the trials, then the reported ones."""
        trials = [
            Job(method, value, seed, reported=False)
            for seed in self.tuning_seeds
            for method in self.methods
            for value in self.trials[method.key]
        ]
        for trained in run_all(trials):
            self.trials[trained.job.method.key][trained.job.value].append(trained)
            yield trained
        # Seed by seed, so that a run that is stopped has all methods for the seeds it finished.
        reported = [
            Job(method, self.chosen(method), seed, reported=True) for seed in self.seeds for method in self.methods
        ]
        for trained in run_all(reported):
            self.reported[trained.job.method.key][trained.job.seed] = trained
            yield trained

    @property
    def trainings(self) -> int:
        """How many there are in all."""
        return sum(map(len, self.trials.values())) * len(self.tuning_seeds) + len(self.methods) * len(self.seeds)

    def chosen(self, method: Method) -> float:
        """The value with the highest validation AUC, mean over the tuning seeds; the first of equals."""
        trials = self.trials[method.key]
        return max(trials, key=lambda value: _mean_validation_auc(trials[value]))

    def to_dict(self) -> dict[str, Any]:
        """What is known so far, as plain numbers."""
        return {
            "methods": {method.key: self._method(method) for method in self.methods},
            "difference_to_hard_sharing": self._differences(),
            "relations": {
                method.key: relations
                for method in self.methods
                if method.rule is not None and (relations := self._relations(method))
            },
            "learning_curves": {
                method.key: self._curves(method) for method in self.methods if self.reported[method.key]
            },
        }

    def _method(self, method: Method) -> dict[str, Any]:
        trials = self.trials[method.key]
        tuned = all(len(done) == len(self.tuning_seeds) for done in trials.values())
        reported = self.reported[method.key]
        return {
            "label": method.label,
            "tuning": {
                "parameter": method.parameter,
                "chosen": self.chosen(method) if tuned else None,
                "trials": [
                    {
                        "value": value,
                        "validation_auc": _mean_validation_auc(done),
                        "per_seed": [
                            {
                                "seed": trained.job.seed,
                                "validation_auc": trained.validation_auc,
                                "validation_loss": trained.validation_loss,
                                "best_epochs": trained.best_epochs,
                            }
                            for trained in done
                        ],
                    }
                    for value, done in trials.items()
                    if done
                ],
            },
            "per_seed": [
                {
                    "seed": seed,
                    **_macro(trained),
                    "per_task": trained.test,
                    "best_epochs": trained.best_epochs,
                    "validation_auc": trained.validation_auc,
                    "validation_loss": trained.validation_loss,
                }
                for seed, trained in reported.items()
            ],
            "summary": summarise([_macro(trained) for trained in reported.values()]) if reported else None,
        }

    def _differences(self) -> dict[str, Any]:
        if BASELINE not in self.reported:
            return {}
        macro = {
            key: {seed: _macro(trained) for seed, trained in reported.items()}
            for key, reported in self.reported.items()
        }
        differences = {}
        for method in self.methods:
            seeds, summary = paired_difference(macro[method.key], macro[BASELINE])
            if method.key != BASELINE and seeds:
                differences[method.key] = {"seeds": seeds, "summary": summary}
        return differences

    def _relations(self, method: Method) -> dict[str, Any]:
        found = {seed: trained.relations for seed, trained in self.reported[method.key].items() if trained.relations}
        if not found:
            return {}
        mean, deviation = mean_and_deviation(torch.tensor(list(found.values()), dtype=torch.float64))
        return {"tasks": self.tasks, "seeds": list(found), "mean": mean.tolist(), "std": deviation.tolist()}

    def _curves(self, method: Method) -> dict[str, Any]:
        reported = self.reported[method.key]
        curves: dict[str, Any] = {"seeds": list(reported)}
        for name in next(iter(reported.values())).curves:
            stack = torch.tensor([trained.curves[name] for trained in reported.values()], dtype=torch.float64)
            mean, deviation = mean_and_deviation(stack)
            curves[name] = {"mean": mean.tolist(), "std": deviation.tolist(), "per_seed": stack.tolist()}
        return curves


def _macro(trained: Trained) -> dict[str, float]:
    return {name: statistics.fmean(trained.test[name]) for name in METRICS}


def _mean_validation_auc(done: Sequence[Trained]) -> float:
    return statistics.fmean(trained.validation_auc for trained in done)
