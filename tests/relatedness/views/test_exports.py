"""Views as files, tables, graphs and pages."""

from __future__ import annotations

import csv
import json
import pickle
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from saliency_reg import RelationViews
from saliency_reg.errors import ConfigurationError, MissingPackageError, WrongTypeError
from saliency_reg.relatedness.views import VIEWS

from .support import HOSTILE, NAN, random_views, same, with_gaps


def hostile() -> RelationViews:
    views = with_gaps(random_views(len(HOSTILE), seed=3, names=HOSTILE), [(0, 1), (2, 2), (2, 5)])
    views.skill[3] = NAN
    views.trajectory["tag"][1, 2, 3] = NAN
    return views


@pytest.mark.parametrize("parts", [0, 6])
def test_json_is_without_loss(tmp_path: Path, parts: int) -> None:
    views = hostile() if parts else random_views(3, parts=0, skill=None)
    views.to_json(tmp_path / "views.json")
    assert "NaN" not in (tmp_path / "views.json").read_text()
    again = RelationViews.from_json(str(tmp_path / "views.json"))
    assert again.tasks == views.tasks
    assert list(again) == list(views)
    for name in ("matrices", "trajectory"):
        one, other = getattr(again, name), getattr(views, name)
        assert one.keys() == other.keys()
        assert all(same(one[key], other[key]) for key in one)
    assert same(again.common_labels, views.common_labels)
    assert same(again.skill, views.skill)
    again.to_json(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "views.json").read_bytes()


def test_json_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "views.json"
    with pytest.raises(ConfigurationError, match="in a folder that does not exist"):
        hostile().to_json(tmp_path / "missing" / "views.json")
    with pytest.raises(ConfigurationError, match="is a folder"):
        hostile().to_json(tmp_path)
    with pytest.raises(WrongTypeError, match="path must be a str or a Path, found int"):
        hostile().to_json(3)
    hostile().to_json(path)
    content = json.loads(path.read_text())
    for text, said in (
        ("{", "is no JSON"),
        ("[1]", "JSON of something else"),
        ('{"format": "other"}', "JSON of something else"),
        (json.dumps({**content, "version": 7}), "has version 7 .* Use a later"),
        (json.dumps({**content, "matrices": [1]}), "was changed after"),
        (json.dumps({key: own for key, own in content.items() if key != "skill"}), "was changed after"),
        (json.dumps({**content, "matrices": {"tag": [[1, 2], [3]]}}), "was changed after"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=said):
            RelationViews.from_json(path)


def test_csv_has_a_row_for_each_ordered_pair(tmp_path: Path) -> None:
    views = hostile()
    views.to_csv(tmp_path / "views.csv")
    with open(tmp_path / "views.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["task", "other", *VIEWS, "common_labels"]
    names = [name.encode("utf-8", "backslashreplace").decode() for name in views.tasks]
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
    assert len(rows) == len(pairs)
    for (i, j), row in zip(pairs, rows):
        assert row[:2] == [names[i], names[j]]
        for key, cell in zip(VIEWS, row[2:]):
            value = float(views[key][i, j])
            assert cell == "" if value != value else float(cell) == value
        assert int(row[-1]) == int(views.common_labels[i, j])


def test_frame_is_the_csv_file(tmp_path: Path) -> None:
    pandas: Any = pytest.importorskip("pandas")
    views = with_gaps(random_views(5), [(0, 1)])
    frame = views.to_frame()
    assert [*frame.columns] == ["task", "other", *VIEWS, "common_labels"]
    assert frame["common_labels"].dtype.kind == "i"
    assert all(frame[key].dtype == "float64" for key in VIEWS)
    assert frame["tag"].isna().sum() == 2
    views.to_csv(tmp_path / "views.csv")
    pandas.testing.assert_frame_equal(pandas.read_csv(tmp_path / "views.csv"), frame, rtol=1e-14)
    pivot = frame.pivot(index="task", columns="other", values="tag").to_numpy()
    expected = views["tag"].clone().fill_diagonal_(NAN)
    assert same(torch.tensor(pivot), expected)


@pytest.mark.parametrize("key", VIEWS)
def test_graph_has_an_edge_for_each_pair_that_is_known(key: str) -> None:
    networkx = pytest.importorskip("networkx")
    views = with_gaps(random_views(5, skill=torch.tensor([0.5, NAN, -0.25, 0, 1])), [(0, 1)])
    graph = views.to_networkx(key)
    assert list(graph) == list(views.tasks)
    assert [graph.nodes[task].get("skill") for task in views.tasks] == [0.5, None, -0.25, 0.0, 1.0]
    assert [graph.nodes[task]["labels"] for task in views.tasks] == views.common_labels.diagonal().tolist()
    directed = key == "tag"
    assert isinstance(graph, networkx.DiGraph) == directed
    assert graph.number_of_edges() == 9 * (1 + directed)
    affinity = views.affinity(key, fill=0.5)
    for i, task in enumerate(views.tasks):
        for j, other in enumerate(views.tasks):
            if i == j or {i, j} == {0, 1}:
                assert not graph.has_edge(other, task)
                continue
            assert graph.edges[other, task] == {
                "weight": affinity[i, j].item(),
                "value": views[key][i, j].item(),  # what other does for task
                "common_labels": views.common_labels[i, j].item(),
            }
    with pytest.raises(ConfigurationError, match="unknown view"):
        views.to_networkx("cosine")


@pytest.mark.parametrize("key", ["gradient_cosine", "tag"])
def test_graphml_is_read_again(tmp_path: Path, key: str) -> None:
    networkx = pytest.importorskip("networkx")
    views = random_views(5, names=["a", "b c", "<d>", "ü&\N{DOG FACE}", 'e"'])
    views.to_graphml(tmp_path / "graph.graphml", key)
    again, graph = networkx.read_graphml(tmp_path / "graph.graphml"), views.to_networkx(key)
    assert type(again) is type(graph)
    assert {name: {**own} for name, own in again.nodes.items()} == {
        name: {**own, "label": name} for name, own in graph.nodes.items()
    }
    assert {pair: {**own} for pair, own in again.edges.items()} == {pair: {**own} for pair, own in graph.edges.items()}


def test_graphml_of_names_that_xml_does_not_have(tmp_path: Path) -> None:
    networkx = pytest.importorskip("networkx")
    views = hostile()
    views.to_graphml(tmp_path / "graph.graphml", "gradient_cosine")
    again = networkx.read_graphml(tmp_path / "graph.graphml")
    assert len(again) == len(HOSTILE)
    assert again.number_of_edges() == views.to_networkx("gradient_cosine").number_of_edges()
    assert HOSTILE[0] in again
    assert sorted(name for name in again if "nul" in name) == [
        "nul \ufffd and bell \ufffd",
        "nul \ufffd and bell \ufffd #4",
    ]


@pytest.mark.parametrize("package", ["pandas", "networkx"])
def test_missing_packages_are_named_with_their_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    views = random_views(3)
    text = rf'{package} could not be imported .*Run: pip install "saliency-reg\[relations\]"'
    calls = (
        [views.to_frame]
        if package == "pandas"
        else [
            lambda: views.to_networkx("tag"),
            lambda: views.to_graphml(tmp_path / "a", "tag"),
        ]
    )
    for call in calls:
        with pytest.raises(MissingPackageError, match=text) as caught:
            call()
        assert isinstance(caught.value, ImportError)
    views.to_csv(tmp_path / "views.csv")
    views.to_json(tmp_path / "views.json")
    assert views.to_html()


class Reader(HTMLParser):
    """Tags, and text of cells; tags that are not closed in order fail."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_html_of_hostile_names() -> None:
    html = hostile().to_html()
    assert html == hostile()._repr_html_()
    reader = read(html)
    assert set(reader.tags) <= {"div", "style", "p", "ul", "li", "table", "caption", "tr", "th", "td", "i"}
    assert HOSTILE[0] in "".join(reader.text)
    assert html.encode("utf-8")
    assert not re.search(r"https?:|src=|href=|@import", html)


def test_html_says_what_is_there() -> None:
    views = with_gaps(random_views(4, skill=torch.tensor([0.5, 0.0, 0.5, 0.5])), [(0, 1)])
    reader = read(views.to_html(pairs=3))
    text = "\n".join(reader.text)
    for kind in VIEWS.values():
        assert kind.label in text
        assert f"Closest: {kind.label}" in text
    assert "At chance level" in text
    assert "95 % of the trajectory" in text
    best = views.closest_pairs("tag", 1)[0]
    assert f"{best.value:.3g}" in text
    assert f"{best.low:.3g} to {best.high:.3g}" in text
    assert reader.tags.count("table") == 15
    assert views.to_html().count('bgcolor="#bdbdbd"') == 14
    none = RelationViews(views.tasks, {"tag": torch.full((4, 4), NAN)}, views.common_labels)
    assert "nothing is known of any pair" in read(none.to_html()).text
    assert "Rank correlations" not in none.to_html()
    assert read(RelationViews(views.tasks, {}, views.common_labels).to_html()).tags


def test_html_stays_small() -> None:
    assert len(random_views(40, parts=0).to_html()) < 400_000
    large = random_views(41, parts=0).to_html()
    assert len(large) < 20_000
    assert "more than 40 tasks" in large


def test_views_are_copied_and_told() -> None:
    views = hostile()
    again = pickle.loads(pickle.dumps(views))
    assert same(again["tag"], views["tag"])
    assert repr(random_views(3)) == f"RelationViews(3 tasks, views {', '.join(VIEWS)}, over 6 parts)"
    assert repr(RelationViews(("a", "b"), {}, torch.ones(2, 2))) == "RelationViews(2 tasks, views none)"
