"""What cannot be drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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

from .support import NAN, trained  # noqa: E402


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
