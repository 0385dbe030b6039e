"""All views of one training beside each other, and the tree of their tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Union

from torch import Tensor

from ... import RelationViews
from ...errors import ConfigurationError, TaskError, WrongTypeError
from ...relatedness.views import Scale, average_linkage, checked_affinity, scale_of
from ..shared.libraries import need
from .canvas import LITERAL, PathLike, checked_path, finish, new_figures, shortened, width_of
from .inputs import numbers_of, task_names
from .tree import draw_branches, tree_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .inputs import Array

_UNKNOWN = "#bdbdbd"
#: More tasks than this make the numbers in the cells unreadable.
_MOST_NUMBERED = 8
_MOST_COLUMNS = 4
_TITLE_POINTS, _POINTS = 9, 7


def draw_views(views: RelationViews, path: PathLike | None = None, *, title: str | None = None) -> Figure:
    """Draw a heat map of each view, all in one order of the tasks, each with a colour scale of its own.

    Orange is close, purple the opposite, in all of them: cosines, correlations and TAG are centred at 0, weights at their
    mean, a distance has its smallest entry in the strongest orange. Grey is unknown. Panels are to be compared by who is
    close to whom, not by how strong their colours are. Up to 8 tasks have numbers in the cells. The title says so if the
    model is at chance level.

    Args:
        views: what a training found.
        path: a file to write, of a kind that its ending tells (``.png``, ``.pdf``, ``.svg``).
        title: above the picture.

    Returns:
        The figure.

    Raises:
        WrongTypeError: no :class:`RelationViews`, or a wrong type of another argument.
        ConfigurationError: there is no view, or no folder for ``path``.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> cosines = torch.tensor([[1, -0.2, 0.8], [-0.2, 1, 0], [0.8, 0, 1]])
        >>> views = RelationViews(("cat", "car", "dog"), {"gradient_cosine": cosines}, torch.full((3, 3), 100))
        >>> figure = draw_views(views)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['cat', 'dog', 'car']
    """
    check_views(views)
    if not views.matrices:
        raise ConfigurationError("these views are empty; there is nothing to draw. Gather at least one view.")
    target = checked_path(path)
    ordered = views.subset(views.order())
    names = shortened(ordered.tasks)
    count, kinds = len(names), ordered.kinds
    rows = -(-len(kinds) // _MOST_COLUMNS)
    columns = -(-len(kinds) // rows)
    cell = max(0.13, 0.45 if count < 5 else 0.36 if count <= _MOST_NUMBERED else 0.24 - 0.003 * count)
    side, widest = max(cell * count, 1.5), width_of(names, _POINTS)
    figure, grid = new_figures(columns * (side + 0.7) + widest, rows * (side + 0.6) + widest + 0.2, rows, columns)
    # At most one place of a row is left over: at the end of the first rows, so that all columns end in the last.
    for row in range(rows * columns - len(kinds)):
        grid[row, -1].remove()
        grid[row, -1] = None
    for kind, axes in zip(kinds, (axes for axes in grid.flat if axes is not None)):
        _draw_panel(figure, axes, numbers_of("views", ordered[kind.key]), scale_of(kind, ordered[kind.key]))
        letters = max(8, int(side * len(kind.label) / width_of([kind.label], _TITLE_POINTS)))
        axes.set_title("\n".join(wrap(kind.label, letters, break_on_hyphens=False)), fontsize=_TITLE_POINTS)
        axes.set_xticks(range(count), [""] * count)
        axes.set_yticks(range(count), [""] * count)
    for axes in grid[-1]:
        axes.set_xticks(range(count), names, fontsize=_POINTS, rotation=90, **LITERAL)
    for axes in grid[:, 0]:
        axes.set_yticks(range(count), names, fontsize=_POINTS, **LITERAL)
    return finish(figure, titled(title, views), target)


def draw_view_tree(
    relations: Union[RelationViews, Tensor],
    tasks: Iterable[str] | None = None,
    path: PathLike | None = None,
    *,
    view: str | None = None,
    fill: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the tasks as a tree (dendrogram): two groups join at the mean affinity of the pairs across them.

    Affinity falls from left to right: what joins left of the dashed line, the mean of all pairs (orange), is closer than the
    average pair is. Of views without ``view`` it is the tree of their consensus, whose order :func:`draw_views` has, too.

    Args:
        relations: what a training found, or an affinity ``[T, T]``: symmetric, in [0, 1], larger is closer.
        tasks: T names, for an affinity. Default: numbers. Long ones are shortened.
        path: a file to write, as in :func:`draw_views`.
        view: of which view; by default the :meth:`~RelationViews.consensus` of all.
        fill: the affinity of pairs of which the view knows nothing; by default they raise an error.
        title: above the picture.

    Returns:
        The figure.

    Raises:
        WrongTypeError, ShapeError, TaskError: no views and no ``[T, T]`` tensor, names that do not fit.
        NonFiniteError: pairs of which nothing is known; names them.
        ConfigurationError: no affinity, a view that there is not, options that are of no use here, no folder for ``path``.
        MissingPackageError: matplotlib is not installed.

    Example:
        >>> affinity = torch.tensor([[1, 0.2, 0.9], [0.2, 1, 0.3], [0.9, 0.3, 1]])
        >>> figure = draw_view_tree(affinity, ["cat", "car", "dog"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['cat', 'dog', 'car']
    """
    target = checked_path(path)
    if isinstance(relations, RelationViews):
        if tasks is not None:
            raise ConfigurationError(
                "views have task names of their own. Leave tasks= out, or use views.subset(tasks)."
            )
        affinity = relations.consensus(fill=fill) if view is None else relations.affinity(view, fill=fill)
        names = shortened(relations.tasks)
        label = "rank of the pairs, 1 being the closest," if view is None else f"affinity ({_label(relations, view)})"
        title = titled(title, relations)
    else:
        if view is not None or fill is not None:
            raise ConfigurationError("view= and fill= are for RelationViews. Leave them out for an affinity.")
        affinity, label = checked_affinity(relations), "affinity"
        names = shortened(task_names(tasks, None, len(affinity), f"relations {list(affinity.shape)}"))
        if len(names) < 2:
            raise TaskError(f"found {len(names)} task {names}; relations between tasks need at least 2.")
    merges, order = average_linkage(affinity)
    heights = [height for _, _, height in merges]
    off = numbers_of("affinity", affinity)[need("numpy").triu_indices(len(names), 1)]
    middle = float(off.mean())
    margin = 0.06 * max(max(heights) - min(heights), 0.1)
    figure, axes = tree_figure(names)
    draw_branches(
        axes, [names[task] for task in order], order, merges, (max(heights) + margin, middle, min(heights) - margin)
    )
    axes.set_xlabel(f"mean {label} where groups join", fontsize=8)
    return finish(figure, title, target)


def check_views(views: object) -> None:
    """Refuse anything but views."""
    if not isinstance(views, RelationViews):
        raise WrongTypeError(
            f"views must be RelationViews, found {type(views).__name__}. Use draw_relations for a matrix of weights, "
            "draw_view_tree for an affinity."
        )


def titled(title: str | None, views: RelationViews) -> str | None:
    """Return the title, and below it whether the model is at chance level."""
    note = views.chance_note
    if note is None or not (title is None or isinstance(title, str)):  # a wrong type is refused later
        return title
    return f"{title}\n{note}" if title else note


def _label(views: RelationViews, view: str) -> str:
    return next(kind.label for kind in views.kinds if kind.key == view)


def _draw_panel(figure: Figure, axes: Any, matrix: Array, scale: Scale) -> None:
    """Draw the cells of one view, their numbers if they are few, and the scale."""
    numpy, colours = need("numpy"), need("matplotlib.colors")
    both = need("matplotlib").colormaps["PuOr_r"]
    if scale.middle is None:
        norm = colours.Normalize(scale.low, scale.high)
        shades = colours.ListedColormap(both(numpy.linspace(0.5, 1, 256)[:: -1 if scale.turned else 1]))
    else:
        norm, shades = colours.TwoSlopeNorm(scale.middle, scale.low, scale.high), both
    shades = shades.with_extremes(bad=_UNKNOWN)
    own = numpy.eye(len(matrix), dtype=bool)
    image = axes.imshow(numpy.ma.masked_invalid(matrix), cmap=shades, norm=norm, interpolation="nearest")
    white = colours.ListedColormap(["white"])
    axes.imshow(numpy.ma.masked_where(~own, numpy.zeros_like(matrix)), cmap=white, interpolation="nearest")
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks([edge - 0.5 for edge in range(1, len(matrix))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6 if len(matrix) <= 20 else 0.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    middle = (scale.low + scale.high) / 2 if scale.middle is None else scale.middle
    ticks = [scale.low, middle, scale.high]
    bar.set_ticks(ticks, labels=[scale.text(tick) for tick in ticks], fontsize=7)
    bar.outline.set_visible(False)
    if len(matrix) <= _MOST_NUMBERED:
        _write_numbers(axes, matrix, scale, lambda value: shades(float(norm(value))))


def _write_numbers(axes: Any, matrix: Array, scale: Scale, colour_of: Any) -> None:
    rows: Sequence[Sequence[float]] = matrix.tolist()
    for row, own in enumerate(rows):
        for column, value in enumerate(own):
            if row != column and value == value:
                red, green, blue, _ = colour_of(value)
                colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
                axes.text(column, row, scale.text(value), ha="center", va="center", fontsize=6.5, color=colour)
