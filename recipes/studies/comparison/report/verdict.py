"""Whether anything beats the baseline, in a sentence that holds for all methods at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ....methods.methods import Method
from ...study import Setting, Study
from ...tables import in_percent, lower_is_better, title_of
from ...verdicts import FEW, HELPS, HURTS, LEAST_SEEDS_ADJUSTED, UNKNOWN, Effect, Verdict, effect_of, name_in_text
from .intervals import challengers, reach
from .options import TRIVIAL

YES, NO = "yes", "no"
#: Told by name.
_MOST_NAMED = 5


def comparison_verdicts(study: Study, metrics: Sequence[str]) -> list[Verdict]:
    """One for each setting that compares other methods with the baseline, about the first metric that it has."""
    found = []
    for setting in study.settings:
        if study.baseline in setting.methods and challengers(study, setting) and metrics:
            found.append(comparison_verdict(study, setting, first_metric(study, setting, metrics)))
    return found


def first_metric(study: Study, setting: Setting, metrics: Sequence[str]) -> str:
    """The first of the metrics that results of a setting have; the first where there is none yet."""
    results = [own for method in study.methods_of(setting) for own in study.reported(setting, method).values()]
    return next((name for name in metrics if any(name in own["macro"] for own in results)), metrics[0])


def comparison_verdict(study: Study, setting: Setting, metric: str) -> Verdict:
    """Answer: does anything here beat the tuned baseline, and by how much?

    A method beats it if the adjusted interval of its difference is clear of 0 (:func:`.intervals.adjusted_interval`): the
    best of many methods is picked by its test result, and has to be better than the best of as many equal ones would be.

    Args:
        study: its results.
        setting: with the baseline, and methods that are compared with it.
        metric: what is compared.

    Returns:
        Its kind is ``"yes"``, ``"no"``, ``"too few seeds"`` or ``"not done"``.
    """
    methods = challengers(study, setting)
    rows = [(method, effect_of(study, setting, method, metric)) for method in methods]
    effects = [(method, effect) for method, effect in rows if effect is not None]
    base, text = name_in_text(study, setting, study.methods[study.baseline]), title_of(metric)
    if not effects:
        return Verdict(setting, UNKNOWN, f"{setting.label}: nothing can be compared with {base} yet.")
    sign = -1 if lower_is_better(metric) else 1
    effects.sort(key=lambda own: -sign * own[1].mean)
    better, worse, few = ([own for own in effects if own[1].adjusted_kind == kind] for kind in (HELPS, HURTS, FEW))
    best, effect = effects[0]
    count = f"{len(methods)} method{'s' if len(methods) > 1 else ''}"
    if better:
        kind = YES
        named = "; ".join(f"{method.label} by {_size(own)}" for method, own in better[:_MOST_NAMED])
        said = (
            f"{len(better)} of {count} beat{'s' if len(better) == 1 else ''} {base} in {text}: {named}{_more(better)}."
        )
    else:
        kind = FEW if len(few) == len(effects) else NO
        lead = f"nothing here beats {base} in {text} clearly; the best of {count} is" if kind == NO else (
            f"{LEAST_SEEDS_ADJUSTED} seeds are needed to compare with {base} in {text}; the best of {count} so far is"
        )  # fmt: skip
        said = f"{lead} {best.label}: {_signed(effect)}.{_seen([own for _, own in effects])}"
    if worse:
        named = "; ".join(f"{method.label} by {_short(own)}" for method, own in reversed(worse[-_MOST_NAMED:]))
        said += f" Clearly worse: {named}{_more(worse)}."
    return Verdict(
        setting, kind, f"{setting.label}: {said}{_unknown(study, setting, rows)}{_trivial(study, setting, metric)}"
    )


def _unknown(study: Study, setting: Setting, rows: Sequence[tuple[Method, Effect | None]]) -> str:
    """Methods without a figure are no answer, neither way."""
    missing = [method for method, effect in rows if effect is None]
    late = [method.label for method in missing if not study.reported(setting, method)]
    broken = [method.label for method in missing if study.reported(setting, method)]
    said = f" Not done: {'; '.join(late[:_MOST_NAMED])}{_more(late)}." if late else ""
    return f"{said} No figure in some seed: {'; '.join(broken[:_MOST_NAMED])}{_more(broken)}." if broken else said


def _trivial(study: Study, setting: Setting, metric: str) -> str:
    """Said where the baseline itself has not clearly learned anything: an interval of one comparison, since it is one."""
    if TRIVIAL not in setting.methods:
        return ""
    trivial = study.methods[TRIVIAL]
    found = study.difference(setting, study.methods[study.baseline], [metric], trivial).get(metric)
    if found is None or math.isnan(found.std):
        return ""
    ours, theirs = (study.reported(setting, own) for own in (study.methods[study.baseline], trivial))
    wide = found.std * reach(len(set(ours) & set(theirs)), 1)
    sign = -1 if lower_is_better(metric) else 1
    if sign * found.mean > wide:
        return ""
    factor, digits = (100, 2) if in_percent(metric) else (1, 4)
    low, high = (f"{factor * (found.mean + end):+.{digits}f}" for end in (-wide, wide))
    base = name_in_text(study, setting, study.methods[study.baseline])
    return (
        f" {base[0].upper()}{base[1:]} itself is not clearly better than the trivial model ({trivial.label}; difference in "
        f"{title_of(metric)} {low} to {high}), so that no difference to it means much."
    )


def _seen(effects: Sequence[Effect]) -> str:
    """How large a difference would have been clear: without it, "no" cannot be told from "nobody can tell"."""
    wide = [(own.adjusted[1] - own.adjusted[0]) / 2 for own in effects if not math.isnan(own.adjusted[0])]
    if not wide:
        return ""
    return (
        f" Half of the methods would have to differ by more than {_rounded(statistics.median(wide))} {effects[0].unit} "
        "to be told apart from it."
    )


def _short(effect: Effect) -> str:
    return f"{_rounded(abs(effect.mean))} {effect.unit}"


def _rounded(size: float) -> str:
    """With two significant digits, however small."""
    return f"{float(f'{size:.2g}'):g}"


def _size(effect: Effect) -> str:
    digits = 2 if effect.unit == "points" else 1
    low, high = sorted(map(abs, effect.adjusted))
    return f"{abs(effect.mean):.{digits}f} {effect.unit} (adjusted 95 % interval {low:.{digits}f} to {high:.{digits}f})"


def _signed(effect: Effect) -> str:
    digits = 2 if effect.unit == "points" else 1
    text = f"{effect.mean:+.{digits}f} {effect.unit}"
    if math.isnan(effect.adjusted[0]):
        return text
    low, high = (f"{end:+.{digits}f}" for end in effect.adjusted)
    return f"{text} (adjusted 95 % interval {low} to {high})"


def _more(named: Sequence[object]) -> str:
    return f"; and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
