"""What a study says in a sentence: whether a method helps, hurts, or makes no clear difference to the baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..methods.methods import Method
from .comparison.report.intervals import adjusted_interval
from .study import Setting, Study
from .tables import in_percent, lower_is_better, title_of
from .trials import count_of

#: With less, the interval by bootstrap is too narrow for a verdict; with 5 seeds it is one of about 85 %, with 10 of 91 %.
LEAST_SEEDS = 5
#: The t interval widens by itself where seeds are few; with 2 it rests on one degree of freedom.
LEAST_SEEDS_ADJUSTED = 3
HELPS, HURTS, UNCLEAR, FEW, UNKNOWN = "helps", "hurts", "no clear difference", "too few seeds", "not done"
#: Of them the first that a setting compares is the one that the verdict is about, whatever its result.
_OURS = ("srdml_default", "srdml")


@dataclass(frozen=True)
class Effect:
    """The paired difference of a method to the baseline, as people read it.

    Attributes:
        metric: of what.
        mean, low, high: the difference and its 95 % interval: in points of a metric in per cent; of an error in per cent of
            the mean error of the baseline.
        wins: seeds in which the method is the better one.
        seeds: that both have.
        adjusted: the interval that holds for all methods of the setting at once, see :mod:`.comparison.intervals`.
    """

    metric: str
    mean: float
    low: float
    high: float
    wins: int
    seeds: int
    adjusted: tuple[float, float] = (math.nan, math.nan)

    @property
    def unit(self) -> str:
        """Of the difference."""
        return "points" if in_percent(self.metric) else "%"

    @property
    def kind(self) -> str:
        """Whether the method helps: by the interval alone."""
        return self._kind((self.low, self.high), LEAST_SEEDS)

    @property
    def adjusted_kind(self) -> str:
        """The same by the adjusted interval."""
        return self._kind(self.adjusted, LEAST_SEEDS_ADJUSTED)

    def _kind(self, interval: tuple[float, float], seeds: int) -> str:
        low, high = interval
        if self.seeds < seeds or math.isnan(low):
            return FEW
        if low <= 0 <= high:
            return UNCLEAR
        return HELPS if (self.mean < 0) == lower_is_better(self.metric) else HURTS


@dataclass(frozen=True)
class Verdict:
    """A sentence on one setting, and what it comes to."""

    setting: Setting
    kind: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.kind.capitalize()}. {self.sentence}"


def effect_of(study: Study, setting: Setting, method: Method, metric: str) -> Effect | None:
    """The difference to the baseline; ``None`` where one of the two has no number."""
    found = study.difference(setting, method, [metric]).get(metric)
    if found is None or math.isnan(found.mean):
        return None
    ours, theirs = (study.reported(setting, own) for own in (method, study.methods[study.baseline]))
    pairs = [(ours[seed]["macro"][metric], theirs[seed]["macro"][metric]) for seed in ours if seed in theirs]
    base = 1.0 if in_percent(metric) else statistics.fmean(their for _, their in pairs)
    if base <= 0:
        return None
    sign = -1 if lower_is_better(metric) else 1
    wins = sum(sign * (our - their) > 0 for our, their in pairs)
    ends = (found.mean, found.low, found.high, *adjusted_interval(study, setting, method, metric))
    mean, low, high, *adjusted = (100 * value / base for value in ends)
    return Effect(metric, mean, low, high, wins, len(pairs), (adjusted[0], adjusted[1]))


def verdicts(study: Study, metrics: Sequence[str]) -> list[Verdict]:
    """One for each setting that compares a method of ours with the baseline.

    Args:
        study: its results.
        metrics: the verdict is about the first that a setting has.
    """
    found = []
    for setting in study.settings:
        method = our_method(study, setting)
        if method is not None and study.baseline in setting.methods and metrics:
            effects = (effect_of(study, setting, method, metric) for metric in metrics)
            effect = next((own for own in effects if own is not None), None)
            kind = UNKNOWN if effect is None else effect.kind
            found.append(Verdict(setting, kind, f"{setting.label}: {_sentence(study, setting, method, effect)}"))
    return found


def our_method(study: Study, setting: Setting) -> Method | None:
    """The method that the verdict is about: chosen by name, never by its result."""
    methods = [method for method in study.methods_of(setting) if method.rule not in (None, "fixed")]
    return min(methods, key=lambda own: _OURS.index(own.key) if own.key in _OURS else len(_OURS), default=None)


def _sentence(study: Study, setting: Setting, method: Method, effect: Effect | None) -> str:
    ours, theirs = name_in_text(study, setting, method), name_in_text(study, setting, study.methods[study.baseline])
    if effect is None:
        return f"{ours} and {theirs} cannot be compared yet."
    digits = 2 if effect.unit == "points" else 1
    text, lower = title_of(effect.metric), lower_is_better(effect.metric)
    if effect.kind in (HELPS, HURTS):
        side = "below" if effect.mean < 0 else "above"
        low, high = sorted(map(abs, (effect.low, effect.high)))
        size = f"{abs(effect.mean):.{digits}f}"
        interval = f"{low:.{digits}f} to {high:.{digits}f}"
        said = f"{ours} is {size} {effect.unit} {side} {theirs} in {text} (95 % interval {interval} {effect.unit})"
    else:
        interval = f"{effect.low:+.{digits}f} to {effect.high:+.{digits}f} {effect.unit}"
        interval = "" if math.isnan(effect.low) else f", 95 % interval {interval}"
        said = f"{ours} against {theirs} in {text}: {effect.mean:+.{digits}f} {effect.unit}{interval}"
    better = "lower" if lower else "higher"
    return f"{said}, {better} in {effect.wins} of {effect.seeds} seed{'s' if effect.seeds > 1 else ''}."


def name_in_text(study: Study, setting: Setting, method: Method) -> str:
    """Within a sentence: ``tuned hard sharing``, ``SRDML (cosine)``."""
    name, comma, rest = method.label.partition(", ")
    if method.key == study.baseline:
        name = f"{'tuned ' if count_of(setting.space(method)) else ''}{name[0].lower()}{name[1:]}"
    return f"{name} ({rest})" if comma else name
