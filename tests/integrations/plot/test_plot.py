"""Pictures of relations and saliencies."""

from __future__ import annotations

import doctest
import itertools
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer
from saliency_reg.errors import (
    ConfigurationError,
    MissingArgumentError,
    MissingPackageError,
    NonFiniteError,
    ShapeError,
    TaskError,
    WrongTypeError,
)

np: Any = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

from saliency_reg.integrations.plot import draw_relations, draw_saliency, draw_task_tree, task_order  # noqa: E402
from saliency_reg.integrations.plot import relations as drawn_relations  # noqa: E402
from saliency_reg.integrations.plot import saliency as drawn_saliency  # noqa: E402

NAMES = ["cost_in_$", "$x_1$ and $\\frac$", "a&b%"]
NAN = float("nan")


def blocks(sizes: list[int], inside: float = 5.0, outside: float = 1.0) -> Tensor:
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    weights = torch.where(group[:, None] == group, inside, outside)
    return weights.fill_diagonal_(0.0)


def shuffled(weights: Tensor, seed: int = 0) -> tuple[Tensor, list[int]]:
    places = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))
    return weights[places][:, places], places.tolist()


def random_weights(count: int, seed: int = 0) -> Tensor:
    weights = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (weights + weights.T).fill_diagonal_(0.0)


def tick_labels(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


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


# Where relations come from.


def trained() -> SaliencyRegularizer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    regularizer = SaliencyRegularizer(model, heads="2", tasks=["left", "middle", "right"])
    model(torch.randn(6, 5))
    regularizer()
    regularizer.step()
    return regularizer


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


# Saliency.


def panel(figure: Any, row: int, column: int, size: int) -> Any:
    """``[size, size, 3]``: a panel, in the pixels of the image; column 0 is the image itself."""
    axes = figure.axes[0]
    x, y = axes.get_xticks()[column], axes.get_yticks()[row]
    pixels = axes.images[0].get_array()
    top, left = round(y - (size - 1) / 2), round(x - (size - 1) / 2)
    return pixels[top : top + size, left : left + size].astype(int)


def hue(pixels: Any) -> Any:
    """Red minus blue: above 0 is orange, below 0 blue, 0 grey."""
    return pixels[..., 0] - pixels[..., 2]


def test_hot_corner_in_the_right_panel() -> None:
    maps = torch.zeros(3, 2, 4, 4)
    maps[1, 0, 0, 3] = 2.0  # task 1, image 0, upper right
    maps[2, 1, 3, 0] = 5.0  # task 2, image 1, lower left
    figure = draw_saliency(torch.full((2, 3, 16, 16), 0.5), maps, ["a", "b", "c"])
    for task in range(3):
        for image in range(2):
            colour = hue(panel(figure, image, task + 1, 16))
            if (task, image) == (1, 0):
                assert colour[:3, -3:].min() > 140
                assert abs(colour[8:, :8]).max() == 0
            elif (task, image) == (2, 1):
                assert colour[-3:, :3].min() > 140
                assert abs(colour[:8, 8:]).max() == 0
            else:
                assert abs(colour).max() == 0
    assert tick_labels(figure.axes[0].yaxis) == ["s = 2", "s = 5"]


def test_hot_corner_in_the_drawn_pixels() -> None:
    maps = torch.zeros(2, 1, 2, 2)
    maps[1, 0, 0, 0] = 1.0
    figure = draw_saliency(torch.full((1, 1, 8, 8), 0.5), maps)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba()).astype(int)
    (x,), (y,) = figure.axes[0].get_xticks()[2:], figure.axes[0].get_yticks()
    for side, expected in ((-3, True), (3, False)):
        across, up = figure.axes[0].transData.transform((x + side, y + side))
        assert bool(hue(pixels[len(pixels) - 1 - int(up), int(across)]) > 140) is expected


def test_scale_is_symmetric_and_shared_by_the_row() -> None:
    maps = torch.zeros(3, 2, 8, 8)
    maps[0], maps[1], maps[2] = 1.0, -1.0, -0.25
    maps[:, 1] *= 1e-3  # the second row has a scale of its own
    figure = draw_saliency(torch.full((2, 3, 8, 8), 0.5), maps)
    for row in range(2):
        plus, minus, little = (panel(figure, row, column, 8)[4, 4] for column in (1, 2, 3))
        assert hue(plus) > 150
        assert hue(minus) < -150
        assert -100 < hue(little) < -10
    assert (panel(figure, 0, 3, 8) == panel(figure, 1, 3, 8)).all()
    assert tick_labels(figure.axes[0].yaxis) == ["s = 1", "s = 0.001"]
    assert tick_labels(figure.axes[1].xaxis) == ["-s", "0", "s"]


def test_opposite_maps_are_equally_opaque() -> None:
    """What shows of the background is the same for a value and its negative."""
    maps = torch.tensor([0.5, -0.5, 1.0])[:, None, None, None].expand(3, 1, 4, 4)
    black, white = (draw_saliency(torch.full((1, 3, 4, 4), level), maps) for level in (0.0, 1.0))
    through = [panel(white, 0, column, 4) - panel(black, 0, column, 4) for column in (1, 2, 3)]
    assert abs(through[0] - through[1]).max() <= 1
    assert through[0].min() > through[2].max() + 50


def test_maps_without_negative_values_have_a_one_sided_scale() -> None:
    figure = draw_saliency(torch.rand(1, 3, 8, 8), torch.rand(2, 1, 3, 3))
    assert tick_labels(figure.axes[1].xaxis) == ["0", "s/2", "s"]
    assert figure.axes[1].get_xlim() == (0.0, 1.0)
    almost = torch.rand(2, 1, 3, 3) - 1e-9  # rounding
    assert draw_saliency(torch.rand(1, 3, 8, 8), almost).axes[1].get_xlim() == (0.0, 1.0)


def test_zero_maps_are_flat_and_marked() -> None:
    maps = torch.randn(2, 2, 4, 4)
    maps[0, 0] = maps[:, 1] = 0
    figure = draw_saliency(torch.rand(2, 3, 8, 8), maps)
    for row, column in ((0, 1), (1, 1), (1, 2)):
        assert abs(hue(panel(figure, row, column, 8))).max() == 0
    assert abs(hue(panel(figure, 0, 2, 8))).max() > 50
    assert tick_labels(figure.axes[0].yaxis)[1] == "all 0"
    assert [text.get_text() for text in figure.axes[0].texts] == ["0"] * 3


def test_rounding_noise_beside_a_real_map_is_flat() -> None:
    maps = torch.stack([torch.randn(1, 4, 4), 1e-7 * torch.randn(1, 4, 4)])
    figure = draw_saliency(torch.full((1, 3, 8, 8), 0.5), maps)
    assert abs(hue(panel(figure, 0, 2, 8))).max() == 0


def test_first_column_is_the_image() -> None:
    images = torch.rand(2, 3, 8, 8)
    expected = (255 * images).round().permute(0, 2, 3, 1).int().numpy()
    maps = torch.rand(1, 2, 4, 4)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    for figure in (
        draw_saliency(images, maps),
        draw_saliency((255 * images).round().byte(), maps),
        draw_saliency(normalised, maps, mean=mean, std=std.tolist()),
        draw_saliency((2 * images - 1).numpy(), maps.numpy(), mean=0.5, std=0.5),
        draw_saliency(images.tolist(), maps.tolist()),
        draw_saliency(list(images), [list(own) for own in maps]),
        draw_saliency(images.requires_grad_(), maps),
    ):
        for row in range(2):
            assert abs(panel(figure, row, 0, 8) - expected[row]).max() <= 1
    grey = draw_saliency(images[:, :1].detach(), maps)
    assert (panel(grey, 0, 0, 8) == expected[0, :, :, :1]).all()


def test_maps_are_resized_to_the_image() -> None:
    ramp = torch.linspace(0, 1, 4).expand(1, 1, 4, 4)
    colours = hue(panel(draw_saliency(torch.full((1, 3, 32, 32), 0.5), ramp), 0, 1, 32))
    assert (np.diff(colours[16]) >= 0).all()  # smooth, no steps of eight pixels
    assert len(set(colours[16].tolist())) > 15
    # A larger map is averaged, not sampled.
    checks = torch.ones(16, 16)
    checks[::2] = 0
    averaged = hue(panel(draw_saliency(torch.full((1, 3, 4, 4), 0.5), checks[None, None]), 0, 1, 4))
    assert averaged.max() - averaged.min() < 40
    assert averaged.min() > 20


def test_bfloat16_and_images_that_are_not_square() -> None:
    figure = draw_saliency(torch.rand(1, 3, 4, 12).bfloat16(), torch.randn(2, 1, 2, 6).bfloat16())
    assert figure.axes[0].images[0].get_array().shape[:2] == (4 + 2 * 2, 3 * 12 + 4 * 2)


def test_large_images_are_made_smaller() -> None:
    pixels = draw_saliency(torch.rand(1, 3, 600, 300), torch.rand(1, 1, 7, 7)).axes[0].images[0].get_array()
    assert pixels.shape[0] < 300


def test_labels_are_framed() -> None:
    figure = draw_saliency(
        torch.rand(2, 3, 8, 8), torch.rand(3, 2, 4, 4), labels=torch.tensor([[1.0, 0.0, NAN], [-1.0, 0.0, 1.0]])
    )
    frames = [patch.get_bbox() for patch in figure.axes[0].patches]
    across, down = figure.axes[0].get_xticks(), figure.axes[0].get_yticks()
    found = [
        (row, column)
        for frame in frames
        for row in range(2)
        for column in range(4)
        if frame.contains(across[column], down[row])
    ]
    assert found == [(0, 1), (1, 3)]
    for frame in frames:  # around the panel, not on it
        assert 8 < frame.width < 8 + 2 * 2
    assert "black frame" in figure.axes[1].get_xlabel()
    without = draw_saliency(torch.rand(2, 3, 8, 8), torch.rand(3, 2, 4, 4))
    assert len(without.axes[0].patches) == 0
    assert "black frame" not in without.axes[1].get_xlabel()


# Names, files, and what is left behind.


def drawings(names: list[str], path: Any = None, title: str | None = None) -> list[Any]:
    count = len(names)
    return [
        draw_relations(random_weights(count), names, path, title=title),
        draw_task_tree(random_weights(count), names, path, title=title),
        draw_saliency(torch.rand(2, 3, 8, 8), torch.rand(count, 2, 4, 4), names, path, title=title),
    ]


def test_names_are_drawn_literally(tmp_path: Path) -> None:
    for figure in drawings(NAMES, tmp_path / "a.png", title="$\\broken_{ costs $"):  # mathematics would raise
        labels = {*tick_labels(figure.axes[0].xaxis), *tick_labels(figure.axes[0].yaxis)}
        assert labels >= set(NAMES)
        assert figure.get_suptitle() == "$\\broken_{ costs $"


def test_glyphs_that_the_font_lacks(tmp_path: Path) -> None:
    for figure in drawings(["\N{CJK UNIFIED IDEOGRAPH-732B}", "\N{DOG FACE}", "ü"], tmp_path / "a.png"):
        assert figure is not None


def test_long_names_are_shortened_and_stay_different() -> None:
    names = [
        "a" * 40 + "_left",
        "a" * 40 + "_right",
        "b" * 13 + "1" * 9 + "c" * 10,
        "b" * 13 + "2" * 9 + "c" * 10,
        "two\nlines",
    ]
    figure = draw_relations(torch.ones(5, 5), names)
    labels = tick_labels(figure.axes[0].xaxis)
    assert labels == [
        "aaaaaaaaaaaaa…aaaaa_left",
        "aaaaaaaaaaaaa…aaaa_right",
        "bbbbbbbbbbbbb…cc… #2",
        "bbbbbbbbbbbbb…cc… #3",
        "two lines",
    ]


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_files(tmp_path: Path, ending: str) -> None:
    for index, draw in enumerate((draw_relations, draw_task_tree)):
        path = tmp_path / f"{index}.{ending}"
        draw(random_weights(4), None, path)
        assert path.stat().st_size > 1000
    path = tmp_path / f"saliency.{ending}"
    draw_saliency(torch.rand(1, 3, 8, 8), torch.rand(2, 1, 4, 4), path=str(path))
    assert path.stat().st_size > 1000


def test_nothing_global_is_touched(tmp_path: Path) -> None:
    code = (
        "import sys, warnings, scipy.cluster.hierarchy, torch, matplotlib; from saliency_reg.integrations import plot\n"
        # Reading the backend would import pyplot.
        "def state(): return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams.keys() - {'backend'}}, warnings.filters[:]\n"
        "before = state(); weights = torch.ones(4, 4)\n"
        "figures = plot.draw_relations(weights, None, 'a.png'), plot.draw_task_tree(weights, None, 'b.png')\n"
        "figure = plot.draw_saliency(torch.zeros(1, 3, 8, 8), torch.ones(2, 1, 2, 2), None, 'c.png')\n"
        "assert not {'matplotlib.pyplot', 'pylab'} & sys.modules.keys()\n"
        "assert state() == before"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_random_number_is_drawn(tmp_path: Path) -> None:
    weights, images, maps = random_weights(6), torch.rand(2, 3, 8, 8), torch.randn(6, 2, 4, 4)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    draw_relations(weights, path=tmp_path / "a.svg")
    draw_task_tree(weights, path=tmp_path / "b.png")
    draw_saliency(images, maps, path=tmp_path / "c.pdf")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_what_was_passed_is_not_changed() -> None:
    weights, images, maps = random_weights(4).numpy(), np.ones((1, 3, 8, 8)), -np.ones((2, 1, 4, 4))
    weights[0, 0] = 7.0
    copies = [array.copy() for array in (weights, images, maps)]
    draw_relations(weights)
    draw_task_tree(weights)
    draw_saliency(images, maps, mean=0.0, std=1.0)
    for array, copy in zip((weights, images, maps), copies):
        assert (array == copy).all()


def test_the_same_picture_each_time(tmp_path: Path) -> None:
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        draw_relations(random_weights(12), path=path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# Errors.


@pytest.mark.parametrize("draw", [task_order, draw_relations, draw_task_tree])
@pytest.mark.parametrize(
    ("relations", "error", "text"),
    [
        (torch.ones(3, 4), ShapeError, r"relations must be \[T, T\] for T tasks, found \[3, 4\]. Use regularizer"),
        (torch.ones(3), ShapeError, r"found \[3\]"),
        (torch.ones(0, 0), ShapeError, r"found \[0, 0\]"),
        ([[0, 1], [1]], ShapeError, "lists of different lengths"),
        (
            [[0, NAN, 1], [NAN, 0, NAN], [1, NAN, 0]],
            NonFiniteError,
            r"NaN or infinite weights, of the tasks \[1\]. Leave",
        ),
        ([[0, NAN, 1], [NAN, 0, 1], [1, 1, 0]], NonFiniteError, r"of the tasks \[0, 1\]"),
        ([[0, float("inf")], [float("inf"), 0]], NonFiniteError, "NaN or infinite"),
        ([[0, -0.5], [-0.5, 0]], ConfigurationError, r"negative weights, down to -0.5; they must be >= 0. Use .*clamp"),
        ([[0, 1], [2, 0]], ConfigurationError, r"not symmetric .* up to 1\). Use \(W \+ W.T\) / 2"),
        ([["a", "b"], ["c", "d"]], WrongTypeError, "real numbers, found list with dtype"),
        (torch.ones(2, 2, dtype=torch.complex64), WrongTypeError, "real numbers, found Tensor with dtype complex64"),
        ({"a": 1}, WrongTypeError, "found dict"),
        (None, WrongTypeError, "found NoneType. Pass the regularizer"),
        (nn.Linear(2, 2), WrongTypeError, "SaliencyReport or a matrix .* found Linear"),
    ],
)
def test_bad_relations(draw: Any, relations: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        draw(relations)


def test_tasks_of_a_report_are_named() -> None:
    regularizer = trained()
    regularizer.report.relations[1] = regularizer.report.relations[:, 1] = NAN
    with pytest.raises(NonFiniteError, match=r"of the tasks \['middle'\]"):
        draw_relations(regularizer.report)


@pytest.mark.parametrize("draw", [draw_relations, draw_task_tree])
@pytest.mark.parametrize(
    ("tasks", "error", "text"),
    [
        (["a", "b"], TaskError, r"found 2 task names for relations \[3, 3\]: 3 tasks"),
        (["a", "b", "a"], TaskError, r"\['a'\] occur more than once"),
        ("picture.png", WrongTypeError, r"found 'picture.png' \(str\). Pass .* path='picture.png'"),
        (Path("picture.png"), WrongTypeError, "list of names"),
        (torch.arange(3), WrongTypeError, "list of names"),
    ],
)
def test_bad_tasks(draw: Any, tasks: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        draw(torch.ones(3, 3), tasks)


@pytest.mark.parametrize("draw", [draw_relations, draw_task_tree])
def test_one_task_has_no_relations(draw: Any) -> None:
    with pytest.raises(TaskError, match=r"found 1 task \['0'\]; relations between tasks need at least 2"):
        draw([[0.0]])


def draw_saliency_of_ones(path: Any = None, title: Any = None) -> Any:
    return draw_saliency(torch.ones(1, 3, 4, 4), torch.ones(2, 1, 4, 4), None, path, title=title)


@pytest.mark.parametrize(
    "draw",
    [
        lambda **options: draw_relations(torch.ones(3, 3), **options),
        lambda **options: draw_task_tree(torch.ones(3, 3), **options),
        draw_saliency_of_ones,
    ],
)
def test_bad_paths_and_titles(draw: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"the folder of path=.*a.png' does not exist. Use Path\(.*mkdir"):
        draw(path=tmp_path / "missing" / "a.png")
    with pytest.raises(ConfigurationError, match=r"known kind, found '.gib'. Use for example 'a.png'"):
        draw(path=tmp_path / "a.gib")
    with pytest.raises(ConfigurationError, match="known kind, found ''"):
        draw(path=str(tmp_path / "a"))
    with pytest.raises(ConfigurationError, match="found a folder"):
        draw(path=tmp_path)
    with pytest.raises(WrongTypeError, match="path must be a str or a Path, found int"):
        draw(path=3)
    with pytest.raises(WrongTypeError, match="title must be a str, found int"):
        draw(path=tmp_path / "a.png", title=3)
    assert list(tmp_path.iterdir()) == []


def test_unknown_order() -> None:
    with pytest.raises(ConfigurationError, match="unknown order 'sorted'. Choose one of 'clustered', 'given'"):
        draw_relations(torch.ones(3, 3), order="sorted")


IMAGES, MAPS = torch.full((2, 3, 8, 8), 0.5), torch.ones(3, 2, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"images": IMAGES[0]}, ShapeError, r"images must be \[B, 3, H, W\].* found \[3, 8, 8\]. Use images\[None\]"),
        (
            {"images": IMAGES.permute(0, 2, 3, 1)},
            ShapeError,
            r"found \[2, 8, 8, 3\]. Use images.permute\(0, 3, 1, 2\)",
        ),
        ({"images": IMAGES[:0]}, ShapeError, r"found \[0, 3, 8, 8\]"),
        (
            {"images": IMAGES.repeat(20, 1, 1, 1)},
            ConfigurationError,
            r"found 40 images; .* at most 32. Use images\[:8\]",
        ),
        ({"images": IMAGES * NAN}, NonFiniteError, r"the images \[0, 1\] hold NaN"),
        ({"images": 400 * IMAGES}, ConfigurationError, r"from 200 to 200, expected 0 to 1. Use images / 255"),
        ({"images": IMAGES - 2}, ConfigurationError, r"from -1.5 to -1.5, expected 0 to 1. Pass the mean="),
        ({"images": "cat.png"}, WrongTypeError, "images must be a tensor, an array or nested lists, found str"),
        ({"mean": 0.5}, MissingArgumentError, "mean and std belong together"),
        ({"mean": [0.5, 0.5], "std": 1}, ShapeError, r"mean must be one finite number or 3, .* found \[0.5, 0.5\]"),
        ({"mean": 2, "std": 1}, ConfigurationError, "times std, plus mean, the images reach from 2.5 to 2.5"),
        ({"images": IMAGES.byte(), "mean": 0, "std": 1}, ConfigurationError, "uint8 are not normalised"),
        ({"maps": MAPS[:, 0]}, ShapeError, r"maps must be \[T, B, h, w\] with B = 2 images, found \[3, 4, 4\]"),
        ({"maps": MAPS.transpose(0, 1)}, ShapeError, r"found \[2, 3, 4, 4\]. Use maps.transpose\(0, 1\)"),
        ({"maps": MAPS[:, :, None]}, ShapeError, r"Use \(maps \* features\).sum\(2\)"),
        ({"maps": MAPS.flatten(2)}, ShapeError, r"Use maps.unflatten\(2, \(h, w\)\)"),
        ({"maps": MAPS[:0]}, ShapeError, r"found \[0, 2, 4, 4\]"),
        ({"maps": MAPS.index_fill(0, torch.tensor(1), NAN)}, NonFiniteError, r"maps of the tasks \[1\] hold NaN"),
        ({"tasks": ["a", "b"]}, TaskError, r"found 2 task names for maps \[3, 2, 4, 4\]: 3 tasks"),
        ({"tasks": "a.png"}, WrongTypeError, "tasks must be a list of names"),
        ({"labels": torch.ones(3, 2)}, ShapeError, r"\[B, T\] = \[2, 3\] .* found \[3, 2\]. Pass labels.T"),
        ({"labels": [0, 2]}, ShapeError, r"found \[2\]. Use torch.nn.functional.one_hot\(labels, 3\)"),
        (
            {"labels": torch.full((2, 3), 0.7)},
            ConfigurationError,
            "labels must be 0 or 1 .* found 0.7. Pass labels > 0.5",
        ),
        ({"labels": [[True, None, False]] * 2}, WrongTypeError, "labels must be .* real numbers"),
    ],
)
def test_bad_saliency_arguments(change: dict[str, Any], error: type[Exception], text: str) -> None:
    draw_saliency(IMAGES, MAPS)
    with pytest.raises(error, match=text):
        draw_saliency(**{"images": IMAGES, "maps": MAPS, **change})


@pytest.mark.parametrize("name", ["matplotlib.figure", "scipy.cluster.hierarchy", "numpy"])
def test_missing_packages(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    text = rf'{name.partition(".")[0]} could not be imported .*Run: pip install "saliency-reg\[plot\]"'
    for draw in (draw_relations, draw_task_tree):
        with pytest.raises(MissingPackageError, match=text) as caught:
            draw([[0, 1], [1, 0]])
        assert isinstance(caught.value, ImportError)
    if name == "scipy.cluster.hierarchy":
        with pytest.raises(MissingPackageError, match=text):
            task_order([[0, 1], [1, 0]])
        draw_relations([[0, 1], [1, 0]], order="given")
        draw_saliency_of_ones()
    else:
        with pytest.raises(MissingPackageError, match=text):
            draw_saliency_of_ones()


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, saliency_reg.integrations.plot; "
        "print([name for name in ('matplotlib', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize("module", [drawn_relations, drawn_saliency])
def test_examples(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_fixed_relations_of_a_given_matrix() -> None:
    relations = RelationWeights(4, "fixed", matrix=blocks([2, 2]))
    assert task_order(relations) == [0, 1, 2, 3]
