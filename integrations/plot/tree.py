"""Branches of a tree of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .canvas import LITERAL, new_figure, width_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STRONGER, _WEAKER = "#B35806", "#737373"
#: More tasks than this have smaller names.
_MOST_LARGE = 20


def tree_figure(names: Sequence[str]) -> tuple[Figure, Any]:
    """Return a figure for a tree of so many names, and its axes."""
    return new_figure(4.2 + width_of(names, _points(names)), 0.7 + 0.2 * max(len(names), 5))


def draw_branches(
    axes: Any,
    names: Sequence[str],
    order: Sequence[int],
    merges: Sequence[tuple[int, int, float]],
    reach: tuple[float, float, float],
) -> None:
    """Draw a tree whose tips are at the left, names beside them.

    Args:
        axes: of :func:`tree_figure`.
        names: T, in the order of the tips from top to bottom.
        order: the T task numbers of the tips.
        merges: the two groups that join (tasks first, then former merges), and where on the axis.
        reach: the left end of the axis, where the tips are; the place of the dashed line; the right end.
    """
    left, middle, right = reach
    places = {task: (left, float(place)) for place, task in enumerate(order)}
    for first, second, height in merges:
        (start, upper), (other_start, lower) = places[first], places[second]
        height = max(height, min(0.0, right))  # rounding
        places[len(places)] = (height, (upper + lower) / 2)
        colour = _STRONGER if height > middle and not math.isclose(height, middle, rel_tol=1e-5) else _WEAKER
        corners = [start, height, height, other_start], [upper, upper, lower, lower]
        axes.plot(*corners, color=colour, linewidth=1.4, solid_joinstyle="miter")
    axes.axvline(middle, color="black", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xlim(left, right)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names, fontsize=_points(names), **LITERAL)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _points(names: Sequence[str]) -> int:
    return 8 if len(names) <= _MOST_LARGE else 7
