"""Pictures of relations: the order, the heat map, the tree."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from saliency_reg import RelationWeights

np: Any = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
from saliency_reg.integrations.plot import draw_relations, draw_saliency, draw_task_tree, task_order  # noqa: E402

from .support import NAN, random_weights, tick_labels, trained  # noqa: E402


def blocks(sizes: list[int], inside: float = 5.0, outside: float = 1.0) -> Tensor:
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    weights = torch.where(group[:, None] == group, inside, outside)
    return weights.fill_diagonal_(0.0)


def shuffled(weights: Tensor, seed: int = 0) -> tuple[Tensor, list[int]]:
    places = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))
    return weights[places][:, places], places.tolist()


# The order.


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_blocks_are_found(seed: int) -> None:
    weights, places = shuffled(blocks([4, 3, 5, 1]), seed)
    groups = [[0] * 4, [1] * 3, [2] * 5, [3]]
    group = [number for block in groups for number in block]
    order = task_order(weights)
    assert sorted(order) == list(range(13))
    found = [group[places[task]] for task in order]
    assert sum(left != right for left, right in itertools.pairwise(found)) == 3


def test_groups_that_are_alike_are_neighbours() -> None:
    weights = blocks([2, 2, 2])
    weights[:2, 4:] = weights[4:, :2] = 3.0  # the first and the last block
    order = task_order(weights)
    assert [task // 2 for task in order] in ([0, 0, 2, 2, 1, 1], [1, 1, 0, 0, 2, 2], [1, 1, 2, 2, 0, 0])


def test_neighbours_are_the_most_alike_that_the_tree_allows() -> None:
    """A chain 0-1-2-3, given as 2, 0, 3, 1: without leaf ordering, ends of merged pairs may face the wrong way."""
    chain = torch.tensor([[0.0, 9, 4, 0], [9, 0, 5, 3], [4, 5, 0, 9], [0, 3, 9, 0]])
    places = [2, 0, 3, 1]
    order = [places[task] for task in task_order(chain[places][:, places])]
    assert order in ([0, 1, 2, 3], [3, 2, 1, 0])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10, 40])
@pytest.mark.parametrize("weight", [0.0, 1e-300, 0.3, 1e300])
def test_equal_weights_leave_the_given_order(count: int, weight: float) -> None:
    assert task_order(torch.full((count, count), weight, dtype=torch.float64)) == list(range(count))


def test_order_does_not_depend_on_scale_precision_or_diagonal() -> None:
    weights = random_weights(20)
    expected = task_order(weights)
    assert expected != list(range(20))
    assert task_order(1e-12 * weights) == expected
    assert task_order(weights.float()) == expected
    assert task_order(weights.numpy()) == expected
    assert task_order(weights.tolist()) == expected
    assert task_order(list(weights)) == expected
    assert task_order(weights.clone().fill_diagonal_(NAN)) == expected
    assert expected[0] < expected[-1]


@pytest.mark.parametrize("draw", [draw_relations, draw_task_tree])
def test_regularizer_report_and_weights(draw: Any) -> None:
    regularizer = trained()
    assert {*tick_labels(draw(regularizer).axes[0].yaxis)} == {"left", "middle", "right"}
    assert {*tick_labels(draw(regularizer.report).axes[0].yaxis)} == {"left", "middle", "right"}
    assert {*tick_labels(draw(regularizer.relations).axes[0].yaxis)} == {"0", "1", "2"}
    assert {*tick_labels(draw(regularizer, ["x", "y", "z"]).axes[0].yaxis)} == {"x", "y", "z"}
    assert task_order(regularizer) == task_order(regularizer.relations) == task_order(regularizer.relations.matrix())


def test_the_regularizer_is_drawn_as_it_is_now() -> None:
    regularizer = trained()
    drawn = draw_relations(regularizer, order="given").axes[0].images[0].get_array()
    now = regularizer.relations.matrix() * 3 / regularizer.relations.mass
    assert abs(drawn.filled(0.0) - now.numpy()).max() < 1e-12
    assert abs(now - (1 - torch.eye(3))).max() > 0.01


# The heat map.


def test_cells_are_relative_and_in_order() -> None:
    weights, places = shuffled(blocks([2, 2]), 1)
    names = [f"{'ab'[place // 2]}{place}" for place in places]
    figure = draw_relations(weights, names)
    cells = figure.axes[0].images[0].get_array()
    labels = tick_labels(figure.axes[0].yaxis)
    assert tick_labels(figure.axes[0].xaxis) == labels
    assert [label[0] for label in labels] in (list("aabb"), list("bbaa"))
    # Six pairs, of a sum of 14.
    expected = blocks([2, 2]).numpy() * 6 / 14
    assert abs(cells.filled(0.0) - expected).max() < 1e-6
    assert np.ma.getmaskarray(cells).tolist() == np.eye(4, dtype=bool).tolist()
    assert [text.get_text() for text in figure.axes[0].texts][:3] == ["2.1", "0.4", "0.4"]


def test_given_order() -> None:
    weights, places = shuffled(blocks([3, 3]), 2)
    figure = draw_relations(weights, [f"task {place}" for place in places], order="given")
    assert tick_labels(figure.axes[0].yaxis) == [f"task {place}" for place in places]


def cell_colour(figure: Any, row: int, column: int, right: float = 0.3) -> tuple[int, ...]:
    """Off the middle of the cell, where a number may be."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())
    x, y = figure.axes[0].transData.transform((column + right, row + 0.3))
    return tuple(int(value) for value in pixels[len(pixels) - 1 - int(y), int(x), :3])


def test_colours() -> None:
    figure = draw_relations([[0, 3, 1.5], [3, 0, 0], [1.5, 0, 0]], order="given")
    red, _, blue = cell_colour(figure, 0, 1)
    assert red > blue + 60  # orange: related
    red, green, blue = cell_colour(figure, 1, 2)
    assert blue > green + 30  # purple: unrelated
    assert cell_colour(figure, 1, 1) == (0xBD,) * 3  # the diagonal
    assert min(cell_colour(figure, 0, 2)) > 235  # uniform


def test_nearly_uniform_weights_look_uniform() -> None:
    weights = 1 + 0.01 * random_weights(5)
    figure = draw_relations(weights)
    colours = [cell_colour(figure, row, column) for row in range(5) for column in range(5) if row != column]
    assert all(min(colour) > 230 for colour in colours)
    assert figure.axes[1].get_ylim() == (0.0, 2.0)


def test_weights_of_zero_are_drawn_as_zero() -> None:
    figure = draw_relations(torch.zeros(3, 3))
    assert {text.get_text() for text in figure.axes[0].texts} == {"0.0"}


def test_numbers_only_in_few_cells() -> None:
    assert len(draw_relations(random_weights(16)).axes[0].texts) == 16 * 15
    assert len(draw_relations(random_weights(17)).axes[0].texts) == 0


def overlaps(boxes: list[Any]) -> list[int]:
    return [index for index, (one, other) in enumerate(itertools.pairwise(boxes)) if one.overlaps(other)]


@pytest.mark.parametrize("count", [2, 3, 10, 40, 80])
@pytest.mark.parametrize("letters", [1, 60])
def test_no_text_lies_on_another(count: int, letters: int) -> None:
    weights = random_weights(count)
    names = [f"{task:02d}" + "m" * letters for task in range(count)]
    maps = torch.rand(count, 2, 4, 4)
    title = "A title of many words that needs more than one line " * 2
    figures = [
        draw_relations(weights, names, title=title),
        draw_task_tree(weights, names, title=title),
        draw_saliency(torch.rand(2, 3, 8, 8), maps, names, title=title),
    ]
    for figure in figures:
        figure.canvas.draw()
        across, down = figure.axes[0].xaxis, figure.axes[0].yaxis
        for axis in (across, down):
            assert overlaps([label.get_window_extent() for label in axis.get_ticklabels()]) == []
        heading = figure.get_suptitle() and figure._suptitle.get_window_extent()
        assert heading.x0 >= 0
        assert heading.x1 <= figure.bbox.x1
        assert not any(label.get_window_extent().overlaps(heading) for label in across.get_ticklabels())
        # Room is left for the picture itself.
        assert figure.axes[0].get_window_extent().height > 0.2 * figure.bbox.height


# The tree.


def branches(figure: Any) -> list[tuple[list[float], list[float]]]:
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 4]
    return [([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]) for line in lines]


def test_branches_join_at_the_mean_weight() -> None:
    weights = [[0.0, 6, 1, 2], [6, 0, 3, 2], [1, 3, 0, 4], [2, 2, 4, 0]]
    figure = draw_task_tree(weights, ["a", "b", "c", "d"])
    uniform = 18 / 6
    joins = sorted((x[1] for x, _ in branches(figure)), reverse=True)
    assert joins == pytest.approx([6 / uniform, 4 / uniform, (1 + 2 + 3 + 2) / 4 / uniform], abs=1e-5)
    assert tick_labels(figure.axes[0].yaxis) == [["a", "b", "c", "d"][task] for task in task_order(weights)]
    left, right = figure.axes[0].get_xlim()
    assert left > 2.0  # the strongest pair
    assert right <= 0.0


@pytest.mark.parametrize("seed", range(6))
def test_branches_do_not_cross(seed: int) -> None:
    corners = branches(draw_task_tree(random_weights(12, seed)))
    assert len(corners) == 11
    lying = [(x[start], x[1], y[start]) for x, y in corners for start in (0, 3)]
    for x, y in corners:
        assert not any(left > x[1] > right and y[0] < height < y[3] for left, right, height in lying)
    tips = max(left for left, _, _ in lying)
    assert {height for left, _, height in lying if left == tips} == set(range(12))


def test_colour_of_joins() -> None:
    lines = draw_task_tree(blocks([2, 2])).axes[0].lines
    colours = {round(float(line.get_xdata()[1]), 2): line.get_color() for line in lines if len(line.get_xdata()) == 4}
    assert colours == {2.14: "#B35806", 0.43: "#737373"}
    uniform = draw_task_tree(torch.ones(6, 6)).axes[0].lines
    assert {line.get_color() for line in uniform if len(line.get_xdata()) == 4} == {"#737373"}


def test_fixed_relations_of_a_given_matrix() -> None:
    relations = RelationWeights(4, "fixed", matrix=blocks([2, 2]))
    assert task_order(relations) == [0, 1, 2, 3]
