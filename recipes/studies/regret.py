"""What the defaults of the package give away: without tuning, how much is kept of what a tuned method gains."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..methods.methods import Method
from .command import StudyCommand
from .results_file import ResultsFile
from .study import FIRST_TUNING_SEED, Setting, Statistic, Study
from .tables import lower_is_better
from .verdicts import LEAST_SEEDS

#: The package's defaults as a method.
UNTUNED = "srdml_default"
#: They stand beside the comparison: models that learn nothing or share everything, and what else shares a backbone.
_BESIDE = ("constant", "pooled", "hard_sharing")
#: Per cent of a tuned gain that have to be kept, and by which a metric may be worse where tuning gains nothing.
LEAST_KEPT, MOST_WORSE = 75.0, 1.0


@dataclass(frozen=True)
class Source:
    """A study whose results are read.

    Attributes:
        command: of the study.
        title: before the label of each setting.
        arguments: those that its results were made with.
        baseline: key of the method that others are compared with, if it is not that of the command.
    """

    command: StudyCommand
    title: str = ""
    arguments: tuple[str, ...] = ()
    baseline: str | None = None


@dataclass(frozen=True)
class Compared:
    """A method, and its difference to the baseline with the same seed."""

    label: str
    summary: Statistic
    difference: Statistic


@dataclass(frozen=True)
class Row:
    """One setting, over the seeds that the baseline, the tuned and the untuned method have.

    Attributes:
        label: of the setting.
        metric: that is tuned by.
        seeds, planned: how many there are, and how many there will be.
        baseline, tuned, untuned: what is compared.
        tried: how many tuned methods the one was chosen of.
        beside: further methods.
    """

    label: str
    metric: str
    seeds: int
    planned: int
    baseline: Compared
    tuned: Compared
    untuned: Compared
    tried: int
    beside: tuple[Compared, ...] = ()

    @property
    def gains(self) -> bool:
        """Whether the interval of the tuned method is clear of 0, on the better side."""
        bounds = (self._gain(self.tuned.difference.low), self._gain(self.tuned.difference.high))
        return min(bounds) > 0

    @property
    def kept(self) -> float:
        """Per cent of the tuned gain that are there without tuning."""
        return 100 * self.untuned.difference.mean / self.tuned.difference.mean

    def better(self, of_error: bool = False) -> float:
        """Per cent of the baseline by which the untuned method is better; below 0 it is worse.

        Args:
            of_error: what a metric that is better the higher it is lacks of 1 stands in its place.
        """
        base = self.baseline.summary.mean
        turned = of_error and not lower_is_better(self.metric)
        return 100 * self._gain(self.untuned.difference.mean) / (1 - base if turned else base)

    def holds(self, of_error: bool = False) -> bool | None:
        """Whether the rule does; ``None`` with too few seeds for an interval. A training that diverged breaks it."""
        if self.seeds < LEAST_SEEDS or math.isnan(self.baseline.summary.mean):
            return None
        return self.kept >= LEAST_KEPT if self.gains else self.better(of_error) >= -MOST_WORSE

    def _gain(self, difference: float) -> float:
        return -difference if lower_is_better(self.metric) else difference


@dataclass
class Regret:
    """What a folder of results says.

    Attributes:
        rows: of settings that have all it takes.
        left_out: of others, by what they lack.
    """

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def read(self, source: Source, path: Path) -> None:
        """Add the settings of a study; where there is no file, it is named as left out.

        Raises:
            DataError: the file has something else than results.
        """
        if not path.exists():
            self.left_out.setdefault("no file of results", []).append(path.name)
            return
        study = _study(source, path)
        metric = [*source.command.judged, *source.command.compared, *source.command.metrics][0]
        for setting in study.settings:
            found = _row(study, setting, metric)
            if isinstance(found, Row):
                self.rows.append(found)
            else:
                self.left_out.setdefault(found, []).append(setting.label)


def _study(source: Source, path: Path) -> Study:
    """With every method that a setting could compare."""
    command = source.command
    options = command.options_of([*source.arguments, "--minutes", "0"])
    settings = [
        replace(
            setting,
            label=f"{source.title}{setting.label}",
            methods=tuple(key for key, method in command.methods.items() if setting.has_space(method)),
        )
        for setting in command.settings_of(options).values()
    ]
    tuning_seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tuning_seeds)
    results = ResultsFile(path, writes=False)
    baseline = source.baseline or command.baseline
    return Study(settings, range(options.seeds), tuning_seeds, results, command.methods, baseline)


def _row(study: Study, setting: Setting, metric: str) -> Row | str:
    """The row of a setting, or what it lacks."""
    base, untuned = study.methods[study.baseline], study.methods[UNTUNED]
    reported = functools.partial(study.reported, setting)
    tuned = [own for own in study.methods_of(setting) if _is_rival(own, untuned) and reported(own)]
    lacking = [own.label for own in (base, untuned) if not reported(own)] + ([] if tuned else ["tuned SRDML"])
    if lacking:
        return f"without a result of {' and '.join(lacking)}"
    # Never by a test score; the first of equals.
    best = max(tuned, key=lambda own: max((score for _, score in study.tuning(setting, own)), default=-math.inf))
    seeds = sorted(set(reported(base)) & set(reported(best)) & set(reported(untuned)))
    if not seeds:
        return "without a seed that all three have"
    same = Study([setting], seeds, study.tuning_seeds, study.results, study.methods, study.baseline)
    unknown = Statistic(*[math.nan] * 4)

    def compared(own: Method) -> Compared:
        found = same.summary(setting, own, [metric])[metric]
        return Compared(own.label, found, same.difference(setting, own, [metric]).get(metric, unknown))

    three = compared(base), compared(best), compared(untuned)
    further = [study.methods[key] for key in _BESIDE if key in setting.methods and key != base.key]
    beside = tuple(compared(own) for own in further if len(same.reported(setting, own)) == len(seeds))
    return Row(setting.label, metric, len(seeds), len(study.seeds), *three, len(tuned), beside)


def _is_rival(method: Method, untuned: Method) -> bool:
    """Whether it is SRDML alone, tuned, on the network of the untuned method."""
    ours = method.key.startswith("srdml") and method.rule is not None
    return ours and method.surgery is None and method.tuned and method.shared == untuned.shared
