"""Pictures of views: heat maps side by side, tree, graph."""

from __future__ import annotations

import doctest
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from saliency_reg import RelationViews
from saliency_reg.errors import (
    ConfigurationError,
    MissingPackageError,
    NonFiniteError,
    ShapeError,
    TaskError,
    WrongTypeError,
)
from saliency_reg.relatedness.views import VIEWS, average_linkage, scale_of
from tests.relatedness.views.support import HOSTILE, random_views, with_gaps

np: Any = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
from saliency_reg.integrations.plot import draw_view_graph, draw_view_tree, draw_views  # noqa: E402
from saliency_reg.integrations.plot import graph as drawn_graph  # noqa: E402
from saliency_reg.integrations.plot import views as drawn_views  # noqa: E402

from .support import tick_labels  # noqa: E402


def panels(figure: Any) -> dict[str, Any]:
    return {axes.get_title().replace("\n", " "): axes for axes in figure.axes if axes.get_title()}


@pytest.fixture(scope="module")
def views() -> RelationViews:
    found: RelationViews = with_gaps(random_views(5, seed=2), [(0, 3)], ["label_correlation"])
    return found


@pytest.fixture(scope="module")
def figure(views: RelationViews) -> Any:
    return draw_views(views, title="Five tasks")


# Heat maps.


def test_all_views_are_drawn_in_one_order(views: RelationViews, figure: Any) -> None:
    drawn, ordered = panels(figure), views.subset(views.order())
    assert list(drawn) == [kind.label for kind in VIEWS.values()]
    for key, kind in VIEWS.items():
        cells = drawn[kind.label].images[0].get_array()
        assert np.array_equal(cells.filled(np.nan), ordered[key].numpy(), equal_nan=True)
    first, last = drawn["Saliency distance"], drawn["TAG affinity"]
    assert tuple(tick_labels(first.yaxis)) == tuple(tick_labels(last.xaxis)) == views.order()
    assert {*tick_labels(first.xaxis)} == {*tick_labels(last.yaxis)} == {""}
    assert figure.get_suptitle() == "Five tasks"


def test_every_column_and_row_has_names(figure: Any) -> None:
    axes = list(panels(figure).values())
    for across in {round(own.get_position().x0, 2) for own in axes}:
        lowest = min(
            (own for own in axes if round(own.get_position().x0, 2) == across), key=lambda own: own.get_position().y0
        )
        assert "" not in tick_labels(lowest.xaxis)
    for down in {round(own.get_position().y0, 2) for own in axes}:
        left = min(
            (own for own in axes if round(own.get_position().y0, 2) == down), key=lambda own: own.get_position().x0
        )
        assert "" not in tick_labels(left.yaxis)


def colour_of(axes: Any, row: int, column: int) -> Any:
    image = axes.images[0]
    return image.cmap(image.norm(image.get_array()))[row, column][:3]


def test_colours_say_who_is_close(views: RelationViews, figure: Any) -> None:
    """The closest pair is orange in every view, also in a distance; what is unknown is grey."""
    drawn, order = panels(figure), views.order()
    for key, kind in VIEWS.items():
        pair = views.closest_pairs(key, 1)[0]
        i, j = order.index(pair.task), order.index(pair.other)
        red, _, blue = max(
            (colour_of(drawn[kind.label], *place) for place in ((i, j), (j, i))), key=lambda own: own[0] - own[2]
        )
        assert red > blue + 0.25, key
    i, j = order.index("task 0"), order.index("task 3")
    assert colour_of(drawn["Label correlation"], i, j) == pytest.approx([0xBD / 255] * 3)
    scale, matrix = scale_of(VIEWS["gradient_cosine"], views["gradient_cosine"]), drawn["Gradient cosine"].images[0]
    assert (matrix.norm.vmin, matrix.norm.vmax) == (scale.low, scale.high)


def test_numbers_only_in_few_cells(figure: Any) -> None:
    assert len(panels(figure)["TAG affinity"].texts) == 20
    assert len(panels(figure)["Label correlation"].texts) == 18
    only = random_views(9, parts=0, matrices={"tag": torch.rand(9, 9)})
    assert len(draw_views(only).axes[0].texts) == 0


def overlaps(boxes: list[Any]) -> list[int]:
    return [index for index, (one, other) in enumerate(itertools.pairwise(boxes)) if one.overlaps(other)]


@pytest.mark.parametrize("count", [3, 40])
def test_no_text_lies_on_another(count: int) -> None:
    views = random_views(count, parts=0, names=[f"{task:02d} of a long name" for task in range(count)])
    views = views.subset(views.tasks)
    few = RelationViews(views.tasks, {key: views[key] for key in ("error_kappa", "tag")}, views.common_labels)
    title = "A title of many words that needs more than one line " * 3
    figure = draw_views(few, title=title)
    figure.canvas.draw()
    heading = figure._suptitle.get_window_extent()
    for axes in panels(figure).values():
        for axis in (axes.xaxis, axes.yaxis):
            assert overlaps([own.get_window_extent() for own in axis.get_ticklabels() if own.get_text()]) == []
        assert not axes.title.get_window_extent().overlaps(heading)
    assert overlaps([axes.title.get_window_extent() for axes in panels(figure).values()]) == []
    figure = draw_view_graph(few, "tag", title=title)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    if count == 3:
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.overlaps(figure._suptitle.get_window_extent()) for box in boxes)
    assert min(box.x0 for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


# Chance level.


def test_pictures_of_a_model_at_chance_level_say_so() -> None:
    views = random_views(3, skill=torch.tensor([0.0, -0.1, -0.5]))
    said = "The model is at chance level: it predicts no task better than a constant guess."
    for draw in (draw_views, draw_view_tree, lambda own, **options: draw_view_graph(own, "tag", **options)):
        assert draw(views).get_suptitle().replace("\n", " ").endswith(said)
        assert draw(views, title="Mine").get_suptitle().replace("\n", " ") == f"Mine {said}"
    some = draw_view_graph(random_views(3, skill=torch.tensor([0.5, -0.1, 0.5])), "tag")
    assert "At chance level, no better than a constant guess: task 1" in some.get_suptitle().replace("\n", " ")
    assert [line.get_markerfacecolor() for line in some.axes[0].lines].count("white") == 1
    assert draw_view_tree(random_views(3)).get_suptitle() == ""


# The tree.


def branches(figure: Any) -> list[float]:
    return sorted(
        (float(line.get_xdata()[1]) for line in figure.axes[0].lines if len(line.get_xdata()) == 4), reverse=True
    )


def test_tree_is_average_linkage(views: RelationViews) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    row, column = np.triu_indices(5, 1)
    affinity = views.affinity("tag")
    for figure, matrix in (
        (draw_view_tree(views), views.consensus()),
        (draw_view_tree(views, view="tag"), affinity),
        (draw_view_tree(affinity, views.tasks), affinity),
        (draw_view_tree(views, view="label_correlation", fill=0.25), views.affinity("label_correlation", fill=0.25)),
    ):
        values = matrix.numpy()[row, column]
        heights = 1 - hierarchy.linkage(1 - values, "average")[:, 2]
        assert branches(figure) == pytest.approx(heights.tolist(), abs=1e-8)
        order = [views.tasks[place] for place in average_linkage(matrix)[1]]
        assert tick_labels(figure.axes[0].yaxis) == order
        (line,) = (line for line in figure.axes[0].lines if line.get_linestyle() == "--")
        assert line.get_xdata()[0] == pytest.approx(values.mean())
        for own in figure.axes[0].lines:
            if len(own.get_xdata()) == 4:
                assert (own.get_color() == "#B35806") == (own.get_xdata()[1] > values.mean())
    assert tuple(tick_labels(draw_view_tree(views).axes[0].yaxis)) == views.order()
    assert tick_labels(draw_view_tree(torch.eye(3)).axes[0].yaxis) == ["0", "1", "2"]


# The graph.


@pytest.mark.parametrize("key", ["gradient_cosine", "saliency_distance"])
def test_graph_joins_the_closest_pairs(views: RelationViews, key: str) -> None:
    figure = draw_view_graph(views, key, pairs=6)
    pairs = [pair for pair in views.closest_pairs(key, 6) if key == "saliency_distance" or pair.value > 0]
    axes = figure.axes[0]
    spots = {text.get_text(): line.get_xydata()[0] for text, line in zip(axes.texts, axes.lines)}
    assert tuple(spots) == views.order()
    joined = {
        frozenset(
            task
            for task, spot in spots.items()
            if min(abs(spot - own.get_path().vertices[end]).max() for end in (0, 2)) < 1e-9
        ): own
        for own in axes.patches
    }
    assert joined.keys() == {frozenset((pair.task, pair.other)) for pair in pairs}
    widths = [joined[frozenset((pair.task, pair.other))].get_linewidth() for pair in pairs]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]
    assert f"{pairs[0].value:.3g} to {pairs[-1].value:.3g}" in figure._supxlabel.get_text()


def test_graph_of_views_that_know_no_close_pair() -> None:
    apart = random_views(3, parts=0, matrices={"gradient_cosine": torch.eye(3) * 1.5 - 0.5})
    figure = draw_view_graph(apart, "gradient_cosine")
    assert len(figure.axes[0].patches) == 0
    assert figure._supxlabel.get_text() == "no pair is above 0: none is drawn"
    nothing = random_views(3, parts=0, matrices={"tag": torch.full((3, 3), torch.nan)})
    assert draw_view_graph(nothing, "tag")._supxlabel.get_text() == "no pair is known"
    assert draw_views(nothing).axes


# Files, names, and what cannot be drawn.


def test_hostile_names_and_files(tmp_path: Path) -> None:
    views = random_views(len(HOSTILE), parts=0, names=HOSTILE)
    few = RelationViews(views.tasks, {"tag": views["tag"]}, views.common_labels, skill=torch.tensor([-1.0] * 6 + [1]))
    for draw in (draw_views, draw_view_tree, lambda own, path: draw_view_graph(own, "tag", path)):
        for ending in ("png", "svg"):
            path = tmp_path / f"a.{ending}"
            draw(few, path=path)
            assert path.stat().st_size > 1000
            path.unlink()


def test_the_same_picture_each_time(tmp_path: Path) -> None:
    views = random_views(6, parts=0)
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        draw_view_graph(views, "tag", path)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_cannot_be_drawn(tmp_path: Path, views: RelationViews) -> None:
    for draw in (draw_views, lambda own: draw_view_graph(own, "tag")):
        with pytest.raises(WrongTypeError, match="views must be RelationViews, found Tensor. Use draw_relations"):
            draw(torch.eye(3))
    with pytest.raises(ConfigurationError, match="these views are empty"):
        draw_views(RelationViews(("a", "b"), {}, torch.ones(2, 2)))
    with pytest.raises(ConfigurationError, match="known kind, found '.gib'"):
        draw_views(views, tmp_path / "a.gib")
    with pytest.raises(WrongTypeError, match="title must be a str, found int"):
        draw_view_tree(random_views(3, skill=-torch.ones(3)), title=3)
    with pytest.raises(ConfigurationError, match="unknown view 'cosine'"):
        draw_view_graph(views, "cosine")
    with pytest.raises(ConfigurationError, match="pairs must be at least 1"):
        draw_view_graph(views, "tag", pairs=0)
    with pytest.raises(ConfigurationError, match="unknown view 'cosine'"):
        draw_view_tree(views, view="cosine")
    with pytest.raises(NonFiniteError, match="knows nothing of 'task 0' and 'task 3'"):
        draw_view_tree(views, view="label_correlation")
    with pytest.raises(ConfigurationError, match="views have task names of their own"):
        draw_view_tree(views, ["a", "b", "c", "d", "e"])
    with pytest.raises(ConfigurationError, match="view= and fill= are for RelationViews"):
        draw_view_tree(torch.eye(3), view="tag")
    with pytest.raises(ConfigurationError, match=r"affinity must be in \[0, 1\]"):
        draw_view_tree(2 * torch.eye(3))
    with pytest.raises(ShapeError, match=r"affinity must be \[T, T\]"):
        draw_view_tree(torch.ones(2, 3))
    with pytest.raises(TaskError, match="at least 2"):
        draw_view_tree(torch.ones(1, 1))
    with pytest.raises(TaskError, match="found 2 task names"):
        draw_view_tree(torch.eye(3), ["a", "b"])
    assert list(tmp_path.iterdir()) == []


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (draw_views, draw_view_tree, lambda own: draw_view_graph(own, "tag")):
        with pytest.raises(MissingPackageError, match=r'Run: pip install "saliency-reg\[plot\]"'):
            draw(random_views(3))


@pytest.mark.parametrize("module", [drawn_views, drawn_graph])
def test_examples(module: Any) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch, "RelationViews": RelationViews})
    assert result.attempted > 0
    assert result.failed == 0
