"""Tasks on a circle, the closest pairs joined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ... import RelationViews
from ...torch_tools import whole_number
from ..shared.libraries import need
from .canvas import LITERAL, PathLike, checked_path, finish, new_figure, shortened, width_of
from .views import check_views, titled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINE, _POINT, _CHANCE = "#B35806", "#404040", "white"
#: Up to so many names are written from left to right, more of them outwards.
_MOST_FLAT = 14
#: Widths in points of the farthest and of the closest pair that is drawn.
_THIN, _THICK = 0.8, 4.5


def draw_view_graph(
    views: RelationViews,
    view: str,
    path: PathLike | None = None,
    *,
    pairs: int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the closest pairs of a view as lines between the tasks, which are on a circle in the order of :func:`draw_views`.

    The closer, the thicker. Pairs that a view with signs puts at 0 or below are not close, and are not drawn, however few
    there are. Tasks at chance level are open circles; the title names them.

    Args:
        views: what a training found.
        view: one of its views; of TAG, the mean of both directions counts.
        path: a file to write, as in :func:`draw_views`.
        pairs: how many at most. Default: three for each two tasks.
        title: above the picture. Default: the name of the view.

    Returns:
        The figure.

    Raises:
        WrongTypeError: no :class:`RelationViews`, or a wrong type of another argument.
        ConfigurationError: a view that there is not, fewer than 1 pair, no folder for ``path``.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> cosines = torch.tensor([[1, -0.2, 0.8], [-0.2, 1, 0], [0.8, 0, 1]])
        >>> views = RelationViews(("cat", "car", "dog"), {"gradient_cosine": cosines}, torch.full((3, 3), 100))
        >>> figure = draw_view_graph(views, "gradient_cosine")
        >>> len(figure.axes[0].patches), [text.get_text() for text in figure.axes[0].texts]
        (1, ['cat', 'dog', 'car'])
    """
    check_views(views)
    count = round(1.5 * len(views.tasks)) if pairs is None else whole_number("pairs", pairs, least=1)
    found = views.closest_pairs(view, count)
    target = checked_path(path)
    kind = next(kind for kind in views.kinds if kind.key == view)
    drawn = [pair for pair in found if not kind.signed or pair.value > 0]
    order = views.order()
    names = shortened(order)
    points = 9 if len(order) <= 20 else 7
    radius = max(1.5, 0.26 * len(order) / (2 * math.pi))
    angles = {task: math.pi / 2 - 2 * math.pi * place / len(order) for place, task in enumerate(order)}
    spots = {task: (math.cos(angle), math.sin(angle)) for task, angle in angles.items()}
    across, down = _reach(spots.values(), names, points, radius)
    figure, axes = new_figure(2 * radius * across + 0.2, 2 * radius * down + 0.4)
    values = [pair.value for pair in drawn]
    for pair in reversed(drawn):  # the closest on top
        share = _share(pair.value, values, kind.closer == "smaller")
        _join(axes, spots[pair.task], spots[pair.other], _THIN + share * (_THICK - _THIN), 0.35 + 0.6 * share)
    flat, gap = len(order) <= _MOST_FLAT, 1 + 0.12 / radius
    for task, name in zip(order, names):
        x, y = spots[task]
        face = _CHANCE if task in views.at_chance else _POINT
        axes.plot([x], [y], "o", markersize=6, markerfacecolor=face, markeredgecolor=_POINT, zorder=3)
        _write_name(axes, name, (gap * x, gap * y), None if flat else angles[task], points)
    axes.set_xlim(-across, across)
    axes.set_ylim(-down, down)
    axes.set_aspect("equal")
    axes.set_axis_off()
    figure.supxlabel(_legend(values, len(found)), fontsize=8)
    return finish(figure, titled(kind.label if title is None else title, views), target)


def _share(value: float, values: list[float], turned: bool) -> float:
    """Return where between the farthest (0) and the closest (1) pair that is drawn a pair is."""
    low, high = min(values), max(values)
    share = (value - low) / (high - low) if high > low else 1.0
    return 1 - share if turned and high > low else share


def _legend(values: list[float], found: int) -> str:
    if not values:
        return "no pair is known" if not found else "no pair is above 0: none is drawn"
    if len(values) == 1:
        return f"1 pair: {values[0]:.3g}"
    return f"{len(values)} closest pairs, thick to thin: {values[0]:.3g} to {values[-1]:.3g}"


def _reach(
    spots: Iterable[tuple[float, float]], names: Sequence[str], points: int, radius: float
) -> tuple[float, float]:
    """Return how far the names reach from the centre, across and down, in radii."""
    flat = len(names) <= _MOST_FLAT
    across = down = 1 + 0.2 / radius
    for (x, y), name in zip(spots, names):
        width = (width_of([name], points) + 0.2) / radius
        across = max(across, abs(x) + width * (1 if flat else abs(x)))
        down = max(down, abs(y) + (0.3 / radius if flat else width * abs(y)))
    return across, down


def _join(axes: Any, one: tuple[float, float], other: tuple[float, float], width: float, opaque: float) -> None:
    """Draw a curve that bends towards the middle: the more, the farther apart its ends are."""
    paths, patches = need("matplotlib.path"), need("matplotlib.patches")
    pull = 1 - 0.65 * math.sqrt(min(1.0, math.dist(one, other)))
    bend = pull * (one[0] + other[0]) / 2, pull * (one[1] + other[1]) / 2
    curve = paths.Path([one, bend, other], [paths.Path.MOVETO, paths.Path.CURVE3, paths.Path.CURVE3])
    line = patches.PathPatch(curve, fill=False, edgecolor=_LINE, linewidth=width, alpha=opaque, capstyle="round")
    axes.add_patch(line)


def _write_name(axes: Any, name: str, place: tuple[float, float], angle: float | None, points: int) -> None:
    """Write a name beside its point; with an angle outwards from the circle, and never upside down."""
    x, y = place
    across = "center" if angle is None and abs(x) < 1e-9 else "left" if x > -1e-9 else "right"
    down = "center" if angle is not None or abs(x) > 1e-9 else "bottom" if y > 0 else "top"
    degrees = 0.0 if angle is None else math.degrees(angle) + (180 if across == "right" else 0)
    axes.text(x, y, name, rotation=degrees, rotation_mode="anchor", ha=across, va=down, fontsize=points, **LITERAL)
