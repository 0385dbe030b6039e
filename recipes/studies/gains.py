"""How far each method is from the baseline, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..runtime.figures import new_figure, save
from .study import Study

_BETTER, _NOT_CLEAR, _WORSE = "#0072B2", "#737373", "#D55E00"


def draw_gains(study: Study, path: Path, metric: str, title: str, leave_out: Sequence[str] = ()) -> None:
    """Draw the mean difference to the baseline and its 95 % interval, a panel for each setting and a line for each method.

    Methods whose interval is clear of 0 are blue above it and orange below; others are grey. Without any difference no file
    is written.

    Args:
        study: its results.
        path: of the picture.
        metric: a share that is better the higher it is; drawn in percentage points.
        title: of the horizontal axis.
        leave_out: keys of methods that are so far away that the others could not be told apart.
    """
    found = {
        setting.label: {
            method.label: difference[metric]
            for method in study.methods_of(setting)
            if method.key not in leave_out
            and metric in (difference := study.difference(setting, method, [metric]))
            and not math.isnan(difference[metric].low)
        }
        for setting in study.settings
    }
    found = {label: own for label, own in found.items() if own}
    if not found:
        return
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    figure, panels = new_figure(2.2 + 2.5 * len(found), 0.9 + 0.3 * len(names), columns=len(found))
    for number, (axes, (label, own)) in enumerate(zip([panels] if len(found) == 1 else panels, found.items())):
        for place, name in enumerate(names):
            if name not in own:
                continue
            low, mean, high = (100 * value for value in (own[name].low, own[name].mean, own[name].high))
            colour = _BETTER if low > 0 else _WORSE if high < 0 else _NOT_CLEAR
            axes.plot([low, high], [place, place], color=colour, linewidth=1.8)
            axes.plot([mean], [place], color=colour, marker="o", markersize=5)
        axes.axvline(0, color="#000000", linewidth=0.8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
        axes.set_title(label.replace(", ", ",\n", 1), fontsize=9)
        axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(title, fontsize=9)
    save(figure, path)
