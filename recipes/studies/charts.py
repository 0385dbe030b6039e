"""Where points and lines of the page's charts are, in per cent of their axes: differences, and learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..runtime.errors import need
from .comparison.report.options import TRIVIAL
from .pictures import Curve, curves_of, shown_curves
from .study import Study
from .tables import lower_is_better, title_of
from .verdicts import HELPS, HURTS, Effect, effect_of

_DASHES = {"-": "", ":": "1.5 4", "--": "7 4", "-.": "7 3 1.5 3"}


def forests(study: Study, compared: Sequence[str], by_adjusted: bool = False) -> list[dict[str, Any]]:
    """For each setting and metric the differences of all methods to the baseline, on an axis of their own.

    Args:
        study: its results.
        compared: metrics.
        by_adjusted: whether colours go by the intervals that hold for all methods at once.
    """
    found = []
    baseline = study.methods[study.baseline]
    for setting in study.settings:
        for metric in compared:
            methods = sorted(study.methods_of(setting), key=lambda own: by_adjusted and own.key == TRIVIAL)
            rows = [(method.label, effect_of(study, setting, method, metric)) for method in methods]
            effects = [(label, effect) for label, effect in rows if effect is not None]
            if effects:
                better = "left" if lower_is_better(metric) else "right"
                axis = _axis([effect for _, effect in effects])
                unit = f"% of the {title_of(metric)} of {baseline.label}" if effects[0][1].unit == "%" else "points"
                title = f"{setting.label}: difference in {title_of(metric)}, {unit}"
                lines = [_line(label, effect, axis, by_adjusted) for label, effect in effects]
                ticks = [{"at": _at(tick, axis), "text": f"{tick:+g}" if tick else "0"} for tick in _ticks(*axis)]
                found.append({"title": title, "rows": lines, "ticks": ticks, "zero": _at(0, axis), "better": better})
    return found


def _axis(effects: Sequence[Effect]) -> tuple[float, float]:
    """Wide enough for all but those that would make the others unreadable."""
    ends = [[own.mean if math.isnan(end) else end for end in (own.low, own.high, *own.adjusted)] for own in effects]
    sizes = sorted(max(map(abs, own)) for own in ends)
    most = 6 * sizes[len(sizes) // 2] or 1.0
    low, high = max(min(0.0, *map(min, ends)), -most), min(max(0.0, *map(max, ends)), most)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _line(label: str, effect: Effect, axis: tuple[float, float], by_adjusted: bool) -> dict[str, Any]:
    digits = 2 if effect.unit == "points" else 1
    text, adjusted = f"{effect.mean:+.{digits}f}{_within(effect.low, effect.high, digits)}", ""
    if not math.isnan(effect.adjusted[0]):
        adjusted = f"adjusted{_within(*effect.adjusted, digits)}"
    kind = effect.adjusted_kind if by_adjusted else effect.kind
    ends = {"mean": effect.mean, "low": effect.low, "high": effect.high}
    ends |= {"wide_low": effect.adjusted[0], "wide_high": effect.adjusted[1]}
    places = {name: _at(effect.mean if math.isnan(value) else value, axis) for name, value in ends.items()}
    side = {HELPS: "helps", HURTS: "hurts"}.get(kind, "unclear")
    beyond = not axis[0] <= effect.mean <= axis[1]
    return {"label": label, "text": text, "adjusted": adjusted, "side": side, "beyond": beyond, **places}


def _within(low: float, high: float, digits: int) -> str:
    return "" if math.isnan(low) else f" [{low:+.{digits}f}, {high:+.{digits}f}]"


def _at(value: float, axis: tuple[float, float]) -> float:
    """A place on an axis in per cent, at its end for what lies beyond."""
    share = (value - axis[0]) / (axis[1] - axis[0])
    return round(100 * min(max(share, 0.0), 1.0), 2)


def _ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    ticks = need("matplotlib.ticker").MaxNLocator(most, integer=whole, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [round(float(tick), 9) for tick in ticks if low <= tick <= high]


def learning_curves(study: Study) -> list[dict[str, Any]]:
    """For each setting the validation score by epoch, mean over seeds, and the share of the penalty."""
    found = []
    for setting in study.settings:
        curves = curves_of(study, setting)
        if curves:
            shown = shown_curves(study, setting, curves)
            known = [(curve, key in shown) for key, curve in curves.items()]
            panels = [
                _panel("validation score (higher is better)", known, "validation_score"),
                _panel("penalty as a share of the task losses, %", known, "penalty_share", logarithmic=True),
            ]
            legend = [{"label": curve.label, "shown": own, **_style(curve)} for curve, own in known]
            toggles = len(shown) < len(curves)
            panels = [own for own in panels if own]
            found.append({"title": setting.label, "legend": legend, "toggles": toggles, "panels": panels})
    return found


def _panel(
    title: str, known: Sequence[tuple[Curve, bool]], name: str, logarithmic: bool = False
) -> dict[str, Any] | None:
    numpy = need("numpy")
    lines = []
    for number, (curve, shown) in enumerate(known):
        if name in curve.per_seed:
            mean = curve.per_seed[name].mean(0)
            with numpy.errstate(divide="ignore", invalid="ignore"):
                heights = numpy.log10(100 * mean) if logarithmic else mean
            points = [(x, y) for x, y in zip(curve.epochs, heights.tolist()) if math.isfinite(y)]
            lines += [(number, curve, shown, points)] if points else []
    if not lines:
        return None
    # The axis is that of what is shown at first, as far down as most of the others end.
    of_shown = [y for _, _, shown, points in lines for _, y in points if shown]
    last = [points[-1][1] for _, _, _, points in lines]
    # The first epochs may be far below all others.
    low = min(
        numpy.quantile(of or [math.inf], part) for of, part in ((of_shown, 0.02 if logarithmic else 0.05), (last, 0.1))
    )
    low, high = float(low), max(y for _, _, _, points in lines for _, y in points)
    margin = 0.05 * (high - low) or 0.05
    axis = (low - margin, high + margin)
    steps = (
        min(x for _, _, _, points in lines for x, _ in points),
        max(x for _, _, _, points in lines for x, _ in points),
    )
    width = steps if steps[0] < steps[1] else (steps[0] - 1, steps[1] + 1)
    ticks = _powers(*axis) if logarithmic else [(tick, f"{tick:g}") for tick in _ticks(*axis)]
    return {
        "title": title,
        "y": [{"at": _at(tick, axis), "text": text} for tick, text in ticks],
        "x": [{"at": _at(tick, width), "text": f"{tick:g}"} for tick in _ticks(*width, most=6, whole=True)],
        "lines": [
            {
                "points": " ".join(f"{_at(x, width):g},{_height(y, axis):g}" for x, y in points),
                "number": number,
                "shown": shown,
                **_style(curve),
            }
            for number, curve, shown, points in lines
        ],
    }


def _powers(low: float, high: float) -> list[tuple[float, str]]:
    """Ticks at 1 and 3 of each power of ten, or at 1 alone."""
    found = [power + part for power in range(-9, 9) for part in (0.0, math.log10(3))]
    within = [(place, f"{float(f'{10**place:.1g}'):g}") for place in found if low <= place <= high]
    return within if len(within) <= 6 else [own for own in within if float(own[0]).is_integer()]


def _height(value: float, axis: tuple[float, float]) -> float:
    """From above, in per cent; beyond the ends it is cut by the picture."""
    return round(100 * (axis[1] - value) / (axis[1] - axis[0]), 2)


def _style(curve: Curve) -> dict[str, str]:
    colour, dashes = curve.style
    dash = _DASHES[dashes] if isinstance(dashes, str) else " ".join(f"{2 * part:g}" for part in dashes[1])
    return {"colour": "currentColor" if colour == "#000000" else colour, "dash": dash}
