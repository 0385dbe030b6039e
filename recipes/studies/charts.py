"""Where points and lines of the page's charts are, in per cent of their axes: differences, and learning curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..runtime.errors import need
from .pictures import Curve, curves_of
from .study import Study
from .tables import lower_is_better, title_of
from .verdicts import HELPS, HURTS, Effect, effect_of

_DASHES = {"-": "", ":": "1.5 4", "--": "7 4", "-.": "7 3 1.5 3"}


def forests(study: Study, compared: Sequence[str]) -> list[dict[str, Any]]:
    """For each setting and metric the differences of all methods to the baseline, on an axis of their own."""
    found = []
    baseline = study.methods[study.baseline]
    for setting in study.settings:
        for metric in compared:
            rows = [(method.label, effect_of(study, setting, method, metric)) for method in study.methods_of(setting)]
            effects = [(label, effect) for label, effect in rows if effect is not None]
            if effects:
                better = "left" if lower_is_better(metric) else "right"
                axis = _axis([effect for _, effect in effects])
                unit = f"% of the {title_of(metric)} of {baseline.label}" if effects[0][1].unit == "%" else "points"
                title = f"{setting.label}: difference in {title_of(metric)}, {unit}"
                lines = [_line(label, effect, axis) for label, effect in effects]
                ticks = [{"at": _at(tick, axis), "text": f"{tick:+g}" if tick else "0"} for tick in _ticks(*axis)]
                found.append({"title": title, "rows": lines, "ticks": ticks, "zero": _at(0, axis), "better": better})
    return found


def _axis(effects: Sequence[Effect]) -> tuple[float, float]:
    """Wide enough for all but those that would make the others unreadable."""
    ends = [[own.mean if math.isnan(end) else end for end in (own.low, own.high)] for own in effects]
    sizes = sorted(max(map(abs, own)) for own in ends)
    most = 6 * sizes[len(sizes) // 2] or 1.0
    low, high = max(min(0.0, *map(min, ends)), -most), min(max(0.0, *map(max, ends)), most)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _line(label: str, effect: Effect, axis: tuple[float, float]) -> dict[str, Any]:
    low, high = (effect.mean if math.isnan(end) else end for end in (effect.low, effect.high))
    digits = 2 if effect.unit == "points" else 1
    text = f"{effect.mean:+.{digits}f}"
    if not math.isnan(effect.low):
        text += f" [{effect.low:+.{digits}f}, {effect.high:+.{digits}f}]"
    side = {HELPS: "helps", HURTS: "hurts"}.get(effect.kind, "unclear")
    places = {name: _at(value, axis) for name, value in (("mean", effect.mean), ("low", low), ("high", high))}
    return {"label": label, "text": text, "side": side, "beyond": not axis[0] <= effect.mean <= axis[1], **places}


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
        curves = list(curves_of(study, setting).values())
        if curves:
            panels = [
                _panel("validation score (higher is better)", curves, "validation_score"),
                _panel("penalty as a share of the task losses, %", curves, "penalty_share", logarithmic=True),
            ]
            legend = [{"label": curve.label, **_style(curve)} for curve in curves]
            found.append({"title": setting.label, "legend": legend, "panels": [own for own in panels if own]})
    return found


def _panel(title: str, curves: Sequence[Curve], name: str, logarithmic: bool = False) -> dict[str, Any] | None:
    numpy = need("numpy")
    lines = []
    for curve in curves:
        if name in curve.per_seed:
            mean = curve.per_seed[name].mean(0)
            with numpy.errstate(divide="ignore", invalid="ignore"):
                heights = numpy.log10(100 * mean) if logarithmic else mean
            points = [(x, y) for x, y in zip(curve.epochs, heights.tolist()) if math.isfinite(y)]
            lines += [(curve, points)] if points else []
    if not lines:
        return None
    values = [y for _, points in lines for _, y in points]
    # The first epochs may be far below all others.
    low, high = float(numpy.quantile(values, 0.02 if logarithmic else 0.05)), max(values)
    margin = 0.05 * (high - low) or 0.05
    axis = (low - margin, high + margin)
    steps = (min(x for _, points in lines for x, _ in points), max(x for _, points in lines for x, _ in points))
    width = steps if steps[0] < steps[1] else (steps[0] - 1, steps[1] + 1)
    ticks = _powers(*axis) if logarithmic else [(tick, f"{tick:g}") for tick in _ticks(*axis)]
    return {
        "title": title,
        "y": [{"at": _at(tick, axis), "text": text} for tick, text in ticks],
        "x": [{"at": _at(tick, width), "text": f"{tick:g}"} for tick in _ticks(*width, most=6, whole=True)],
        "lines": [
            {"points": " ".join(f"{_at(x, width):g},{_height(y, axis):g}" for x, y in points), **_style(curve)}
            for curve, points in lines
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
