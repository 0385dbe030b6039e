"""Pictures of results, good enough for a paper."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runtime.errors import need
from ..runtime.figures import new_figure, save

__all__ = ["draw_conflicts", "draw_learning_curves"]

#: Okabe and Ito's palette, safe for colour-blind readers, with line styles for print without colour.
_STYLES = (
    ("#000000", ":"),
    ("#E69F00", "--"),
    ("#D55E00", "-"),
    ("#56B4E9", "-"),
    ("#999999", ":"),
    ("#999999", "-"),
    ("#0072B2", "-"),
    ("#CC79A7", "-."),
    ("#009E73", (0, (5, 1))),
    ("#D55E00", (0, (4, 1, 1, 1))),
    ("#56B4E9", (0, (4, 1, 1, 1))),
)
#: Bands of more lines than this hide each other.
_MOST_BANDS = 5


def draw_learning_curves(path: Path, curves: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """Validation loss and AUC by epoch: mean over seeds, with a band of one standard deviation if there are few methods.

    A method's place among the labels decides its style, so that it looks the same in all pictures.
    """
    figure, (left, right) = new_figure(9.0, 3.9, columns=2)
    _draw_by_epoch(left, curves, labels, "validation_loss", 1.0)
    _draw_by_epoch(right, curves, labels, "validation_auc", 100.0)
    left.set_ylabel("validation loss (cross-entropy, nats)")
    right.set_ylabel("validation AUC (%)")
    left.set_ylim(bottom=0)
    _stretch_towards_100(right)
    _describe_lines(figure, left, curves, "Mean over tasks")
    save(figure, path)


def draw_conflicts(path: Path, curves: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """Share of conflicting task gradients by epoch."""
    figure, axes = new_figure(6.4, 4.2)
    _draw_by_epoch(axes, curves, labels, "conflicts", 100.0)
    axes.set_ylabel("pairs of tasks in conflict (%)")
    axes.set_ylim(0, 100)
    _describe_lines(figure, axes, curves, "Task gradients at the feature map, all training images at once")
    save(figure, path)


def _draw_by_epoch(axes: Any, curves: Mapping[str, Any], labels: Mapping[str, str], name: str, factor: float) -> None:
    numpy = need("numpy")
    styles = dict(zip(labels, itertools.cycle(_STYLES)))
    for key, curve in curves.items():
        colour, style = styles[key]
        mean = factor * numpy.array(curve[name]["mean"], dtype=float)
        deviation = factor * numpy.array(curve[name]["std"], dtype=float)
        epochs = numpy.arange(1, len(mean) + 1)
        axes.plot(epochs, mean, color=colour, linestyle=style, linewidth=1.6, label=labels[key])
        if len(curve["seeds"]) > 1 and len(curves) <= _MOST_BANDS:
            axes.fill_between(epochs, mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(need("matplotlib.ticker").MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.01)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _describe_lines(figure: Any, axes: Any, curves: Mapping[str, Any], title: str) -> None:
    """Legend below, and above what the lines are."""
    seeds = max(len(curve["seeds"]) for curve in curves.values())
    handles, names = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(len(names), 5 if len(names) <= 5 else round(figure.get_figwidth() / 2.2)),
        frameon=False,
    )
    lines = "lines and bands: mean and standard deviation" if axes.collections else "lines: mean"
    what = f"; {lines} of {seeds} seeds" if seeds > 1 else ", one seed"
    figure.suptitle(f"{title}{what}", fontsize=10)


def _stretch_towards_100(axes: Any) -> None:
    """A logarithmic scale of what is missing to 100 %, where good methods differ."""
    numpy = need("numpy")
    least_missing = 0.1
    low, high = axes.dataLim.intervaly
    axes.set_yscale(
        "function",
        functions=(
            lambda percent: -numpy.log10(numpy.maximum(100 - percent, least_missing)),
            lambda stretched: 100 - 10**-stretched,
        ),
    )
    low, top = max(low - 1, 0.0), min(100 - 0.8 * (100 - high), 100 - least_missing)
    axes.set_ylim(low, top)
    ticks = [tick for tick in (0, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9) if low <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
