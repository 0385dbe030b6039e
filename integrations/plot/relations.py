"""Heat map and tree of the tasks by their relation weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...errors import TaskError
from ...torch_tools import check_choice
from ..shared.libraries import need
from .canvas import LITERAL, PathLike, checked_path, finish, new_figure, shortened, width_of
from .inputs import Relations, relative_weights, task_names
from .tree import draw_branches, tree_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .inputs import Array


#: More tasks than this make the numbers in the cells unreadable.
_MOST_NUMBERED = 16
_NO_RELATION = "#bdbdbd"


def task_order(relations: Relations) -> list[int]:
    """Return an order of the tasks in which related ones are neighbours.

    Hierarchical clustering: the distance of two tasks is the largest relation weight minus theirs, groups are as far apart
    as their pairs are on average (average linkage), and of all orders that a tree of these groups allows, the one with the
    smallest sum of distances between neighbours is taken. Of ties, the given order decides: weights that are all equal, or
    all zero, leave it as it is; of an order and its reverse, the one that begins with the smaller number is taken.

    Args:
        relations: ``[T, T]``, symmetric, ``>= 0``, of any sum, the diagonal is ignored; or a :class:`SaliencyRegularizer`,
            :class:`RelationWeights` or :class:`SaliencyReport`.

    Returns:
        The T task numbers.

    Raises:
        WrongTypeError, ShapeError: no ``[T, T]`` numbers.
        NonFiniteError: NaN or infinity outside the diagonal.
        ConfigurationError: negative weights, or a matrix that is not symmetric.
        MissingPackageError: scipy is not installed.

    Example:
        >>> task_order([[0, 1, 5, 2], [1, 0, 1, 5], [5, 1, 0, 1], [2, 5, 1, 0]])
        [1, 3, 0, 2]
    """
    weights, _ = relative_weights(relations)
    return _clustered(weights)[0]


def draw_relations(
    relations: Relations,
    tasks: Iterable[str] | None = None,
    path: PathLike | None = None,
    *,
    order: str = "clustered",
    title: str | None = None,
) -> Figure:
    """Draw a heat map of the relation weights relative to uniform weights: a cell at 1 is a pair without preference.

    Orange pairs are pulled together more than the average pair, purple ones less; the diagonal is grey. The scale always
    reaches from 0 to at least 2, so that weights that are nearly uniform look uniform. Up to 16 tasks have numbers in the
    cells.

    Args:
        relations: ``[T, T]``, symmetric, ``>= 0``, T at least 2, of any sum, the diagonal is ignored; or a
            :class:`SaliencyRegularizer` (its weights now), :class:`RelationWeights` or :class:`SaliencyReport`.
        tasks: T names. Default: those of the regularizer or the report, else numbers. Long ones are shortened.
        path: a file to write, of a kind that its ending tells (``.png``, ``.pdf``, ``.svg``).
        order: ``"clustered"``, that of :func:`task_order`, or ``"given"``, which does without scipy.
        title: above the picture.

    Returns:
        The figure.

    Raises:
        WrongTypeError, ShapeError, NonFiniteError: as in :func:`task_order`, or a wrong type of another argument.
        TaskError: fewer than 2 tasks, or names that do not fit them.
        ConfigurationError: negative or asymmetric weights, an unknown order, no folder for ``path``.
        MissingPackageError: matplotlib or scipy is not installed.

    Example:
        >>> figure = draw_relations([[0, 3, 1], [3, 0, 1], [1, 1, 0]], ["smiling", "young", "glasses"])
        >>> figure.axes[0].images[0].get_array().round(1).tolist()
        [[None, 1.8, 0.6], [1.8, None, 0.6], [0.6, 0.6, None]]
    """
    check_choice("order", order, ("clustered", "given"))
    target = checked_path(path)
    weights, names = _weights_and_names(relations, tasks)
    if order == "clustered":
        chosen = _clustered(weights)[0]
        weights, names = weights[chosen][:, chosen], [names[index] for index in chosen]
    cell = min(0.7 if len(names) < 4 else 0.42, max(0.2, 4.2 / len(names)))
    points = 8 if cell > 0.22 else 7
    width, side = width_of(names, points), cell * len(names)
    upright = width > 0.85 * cell
    figure, axes = new_figure(side + width + 1.2, side + (width if upright else 0.2) + 0.4)
    colours, scale = _draw_cells(figure, axes, weights)
    axes.set_xticks(range(len(names)), names, fontsize=points, rotation=90 if upright else 0, **LITERAL)
    axes.set_yticks(range(len(names)), names, fontsize=points, **LITERAL)
    if len(names) <= _MOST_NUMBERED:
        _write_numbers(axes, weights, colours, scale)
    return finish(figure, title, target)


def draw_task_tree(
    relations: Relations,
    tasks: Iterable[str] | None = None,
    path: PathLike | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Draw the tasks as a tree (dendrogram): two groups join at the mean relation weight of the pairs across them.

    The weight is relative to uniform weights, and falls from left to right: what joins left of the dashed line at 1 (orange)
    is related more than the average pair is. The tasks are in the order of :func:`task_order`.

    Args:
        relations, tasks, path: as in :func:`draw_relations`.
        title: above the picture.

    Returns:
        The figure.

    Raises:
        WrongTypeError, ShapeError, NonFiniteError: as in :func:`task_order`, or a wrong type of another argument.
        TaskError: fewer than 2 tasks, or names that do not fit them.
        ConfigurationError: negative or asymmetric weights, no folder for ``path``.
        MissingPackageError: matplotlib or scipy is not installed.

    Example:
        >>> figure = draw_task_tree([[0, 1, 3], [1, 0, 1], [3, 1, 0]], ["smiling", "young", "glasses"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['smiling', 'glasses', 'young']
    """
    target = checked_path(path)
    weights, names = _weights_and_names(relations, tasks)
    order, merges = _clustered(weights)
    figure, axes = tree_figure(names)
    left = 1.06 * max(2.0, float(weights.max()))  # the strongest pair, too, has branches that can be seen
    draw_branches(axes, [names[index] for index in order], order, merges, (left, 1.0, -0.02 * left))
    axes.set_xlabel("mean relation weight where groups join / uniform weight", fontsize=8)
    return finish(figure, title, target)


def _weights_and_names(relations: Relations, tasks: Iterable[str] | None) -> tuple[Array, list[str]]:
    weights, known = relative_weights(relations)
    names = task_names(tasks, known, len(weights), f"relations {list(weights.shape)}")
    if len(names) < 2:
        raise TaskError(f"found {len(names)} task {names}; relations between tasks need at least 2.")
    return weights, shortened(names)


def _clustered(weights: Array) -> tuple[list[int], list[tuple[int, int, float]]]:
    """Return the order; and of each merge the two groups (tasks first, then former merges) and their mean weight."""
    hierarchy = need("scipy.cluster.hierarchy")
    numpy = need("numpy")
    count, top = len(weights), float(weights.max())
    if count == 1:
        return [0], []
    row, column = numpy.triu_indices(count, 1)
    # Rounded, since the last digits of equal weights may differ, and ties then follow the given order.
    distances = numpy.round(1 - weights[row, column] / top, 6) if top > 0 else numpy.ones(len(row))
    apart = (column - row) / count
    tree = hierarchy.linkage(distances + 1e-9 * apart, "average")
    # The ordering works in float32: a tie needs more of a push there, and no offset.
    tree = hierarchy.optimal_leaf_ordering(tree, distances - distances.min() + 1e-4 * apart)
    order = hierarchy.leaves_list(tree).tolist()
    merges = [(int(first), int(second), top * (1 - height)) for first, second, height, _ in tree.tolist()]
    return (order if order[0] < order[-1] else order[::-1]), merges


def _draw_cells(figure: Figure, axes: Any, weights: Array) -> tuple[Any, Any]:
    """Draw the cells and their scale; return what turns a weight into a colour."""
    numpy = need("numpy")
    top = max(2.0, float(weights.max()))
    # The neutral middle is the uniform weight, wherever the largest one is.
    scale = need("matplotlib.colors").TwoSlopeNorm(1.0, vmin=0.0, vmax=top)
    colours = need("matplotlib").colormaps["PuOr_r"].with_extremes(bad=_NO_RELATION)
    cells = numpy.ma.masked_where(numpy.eye(len(weights), dtype=bool), weights)
    image = axes.imshow(cells, cmap=colours, norm=scale, interpolation="nearest", origin="upper")
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks([edge - 0.5 for edge in range(1, len(weights))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8 if len(weights) <= 40 else 0.3)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    ticks = [0.0, 0.5, 1.0, (1 + top) / 2, top]
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks], fontsize=8)
    bar.set_label("relation weight" + (" " if len(weights) > 5 else "\n") + "/ uniform weight", fontsize=8)
    bar.outline.set_visible(False)
    return colours, scale


def _write_numbers(axes: Any, weights: Array, colours: Any, scale: Any) -> None:
    for row, own in enumerate(weights.tolist()):
        for column, value in enumerate(own):
            if row == column:
                continue
            red, green, blue, _ = colours(float(scale(value)))
            colour = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
            text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
