"""All factors in one picture, and in one table: the difference to hard sharing at each level, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtime.figures import new_figures, save
from ..study import Setting, Study
from ..tables import lower_is_better, markdown_table, title_of
from ..verdicts import Effect, effect_of
from .factors import Factor, Level, setting_key
from .methods import DEFAULT, TUNED

#: The methods of each panel: name, colour, marker, and the place beside the level.
_LINES = {TUNED: ("SRDML, share tuned", "#0072B2", "o", -0.13), DEFAULT: ("SRDML, not tuned", "#D55E00", "s", 0.13)}
_COLUMNS = 3
#: Metrics that are compared, of which each data set has one.
COMPARED = ("auc", "nmse")

#: Of a factor of a data set: of each level, the effect of each method that has one.
Panel = tuple[str, Factor, list[tuple[Level, dict[str, Effect]]]]


def panels_of(study: Study, factors: Sequence[tuple[str, Factor]]) -> list[Panel]:
    """What is known; factors of which no more than the common level is known are left out.

    Args:
        study: the results.
        factors: each with its data.
    """
    settings = {setting.key: setting for setting in study.settings}
    found = []
    for data, factor in factors:
        keys = [(level, setting_key(data, factor, level)) for level in factor.levels]
        levels = [(level, _effects(study, settings[key])) for level, key in keys if key in settings]
        if any(level.key and effects for level, effects in levels):
            found.append((data, factor, levels))
    return found


def _effects(study: Study, setting: Setting) -> dict[str, Effect]:
    found = {}
    for method in study.methods_of(setting):
        line = method.key.partition(":")[0]
        effects = (effect_of(study, setting, method, metric) for metric in COMPARED)
        effect = next((own for own in effects if own is not None), None)
        if line in _LINES and effect is not None:
            found[line] = effect
    return found


def table_of(panels: Sequence[Panel]) -> str:
    """All levels as Markdown."""
    rows = [["data", "factor", "level", *(f"{name}, difference to hard sharing" for name, *_ in _LINES.values())]]
    for data, factor, levels in panels:
        for level, effects in levels:
            cells = [_text(effects[line]) if line in effects else "-" for line in _LINES]
            rows.append([data, factor.label, f"{level.label}{'' if level.key else ' (common)'}", *cells])
    return markdown_table(rows)


def _text(effect: Effect) -> str:
    digits = 2 if effect.unit == "points" else 1
    interval = "" if math.isnan(effect.low) else f" [{effect.low:+.{digits}f}, {effect.high:+.{digits}f}]"
    text = f"{title_of(effect.metric)} {effect.mean:+.{digits}f}{interval} {effect.unit}"
    return f"{text}, better in {effect.wins} of {effect.seeds}"


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw a panel for each factor; without any panel no file is written."""
    if not panels:
        return
    by_data = [[panel for panel in panels if panel[0] == data] for data in dict.fromkeys(panel[0] for panel in panels)]
    columns = min(_COLUMNS, max(map(len, by_data)))
    rows = [own[start : start + columns] for own in by_data for start in range(0, len(own), columns)]
    figure, axes = new_figures(3.1 * columns, 2.5 * len(rows) + 0.5, len(rows), columns)
    for number, own in enumerate(axes):
        row, column = divmod(number, columns)
        if column < len(rows[row]):
            _draw_panel(own, *rows[row][column])
        else:
            own.set_visible(False)
    named: dict[str, Any] = {}
    for own in axes:
        named.update({label: handle for handle, label in zip(*own.get_legend_handles_labels())})
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), frameon=False)
    text = "Difference to tuned hard sharing with the same seed: mean, and 95 % interval; * is the common level"
    figure.suptitle(text, fontsize=10)
    save(figure, path)


def _draw_panel(axes: Any, data: str, factor: Factor, levels: Sequence[tuple[Level, dict[str, Effect]]]) -> None:
    shown: Effect | None = None
    for line, (name, colour, marker, shift) in _LINES.items():
        own = [(place + shift, effects[line]) for place, (_, effects) in enumerate(levels) if line in effects]
        shown = own[0][1] if own else shown
        places = [place for place, _ in own]
        axes.vlines(
            places,
            [_end(effect, "low") for _, effect in own],
            [_end(effect, "high") for _, effect in own],
            color=colour,
        )
        axes.plot(
            places,
            [effect.mean for _, effect in own],
            color=colour,
            marker=marker,
            markersize=4.5,
            linestyle="none",
            label=name,
        )
    axes.axhline(0, color="#000000", linewidth=0.8)
    axes.set_xlim(-0.5, len(levels) - 0.5)
    labels = [f"{level.label}{'' if level.key else '*'}" for level, _ in levels]
    slanted: dict[str, Any] = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if len(levels) > 3 else {}
    axes.set_xticks(range(len(levels)), labels, fontsize=8, **slanted)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(f"{data}: {factor.label}", fontsize=9)
    if shown is not None:
        better = "lower" if lower_is_better(shown.metric) else "higher"
        axes.set_ylabel(f"{title_of(shown.metric)}, {shown.unit}\n({better} is better)", fontsize=8)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _end(effect: Effect, name: str) -> float:
    value: float = getattr(effect, name)
    return effect.mean if math.isnan(value) else value
