"""Names in pictures, files, and what drawing leaves behind."""

from __future__ import annotations

import doctest
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

np: Any = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
from saliency_reg.integrations.plot import draw_relations, draw_saliency, draw_task_tree  # noqa: E402
from saliency_reg.integrations.plot import relations as drawn_relations  # noqa: E402
from saliency_reg.integrations.plot import saliency as drawn_saliency  # noqa: E402

from .support import random_weights, tick_labels  # noqa: E402

NAMES = ["cost_in_$", "$x_1$ and $\\frac$", "a&b%"]


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
