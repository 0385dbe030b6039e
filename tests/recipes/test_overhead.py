"""The overhead recipe on a tiny model: its steps do what they say, and the table and the file come out."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from recipes import overhead
from recipes.overhead_steps import STEPS, ManyHeads, make_data

TINY = ["--steps", "3", "--warmup", "1", "--slow-steps", "2", "--width", "2", "--size", "32", "--batch-size", "2"]


def test_the_published_loop_and_the_regularizer_take_the_same_step() -> None:
    """In the first step the relations are uniform, so both are the same penalty, computed in two ways."""
    torch.manual_seed(0)
    model = ManyHeads(3, width=2).double()
    images, labels = (tensor.double() for tensor in make_data(3, 4, 32))
    after = {}
    for name in ("plain", "regularizer", "loop"):
        twin = copy.deepcopy(model)
        STEPS[name](twin, images, labels, None)()
        after[name] = torch.nn.utils.parameters_to_vector(twin.parameters())
    torch.testing.assert_close(after["regularizer"], after["loop"], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(after["regularizer"], after["plain"], rtol=1e-10, atol=1e-12)


def test_surgery_on_the_parameters_takes_one_step_in_three_ways() -> None:
    """With two tasks the order of the projections does not matter."""
    pytest.importorskip("torchjd")
    torch.manual_seed(0)
    model = ManyHeads(2, width=2).double()
    images, labels = (tensor.double() for tensor in make_data(2, 4, 32))
    after = {}
    for name in ("plain", "parameters", "torchjd", "textbook", "surgery"):
        twin = copy.deepcopy(model)
        STEPS[name](twin, images, labels, None)()
        after[name] = torch.nn.utils.parameters_to_vector(twin.parameters())
    for name in ("torchjd", "textbook"):
        torch.testing.assert_close(after[name], after["parameters"], rtol=1e-9, atol=1e-12)
    different = {tuple(after[name].tolist()) for name in ("plain", "parameters", "surgery")}
    assert len(different) == 3


def test_table_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--tasks",
        "3",
        "12",
        "--max-tasks-per-step",
        "5",
        "--no-memory",
        "--out",
        str(tmp_path),
        "--name",
        "run",
    ]
    assert overhead.main([*TINY, *options]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [(row["tasks"], row["step"], row["variant"]) for row in result["rows"]] == [
        (3, "regularizer", None),
        (3, "floor", None),
        (3, "surgery", None),
        (3, "regularizer_surgery", None),
        (3, "surgery", "linear"),
        (3, "regularizer_surgery", "linear"),
        (3, "surgery", "two-layer"),
        (3, "loop", None),
        (3, "parameters", None),
        (3, "torchjd", None),
        (3, "textbook", None),
        (12, "regularizer", None),
        (12, "floor", None),
        (12, "surgery", None),
        (12, "regularizer_surgery", None),
        (12, "regularizer", "heads_alone"),
    ]
    assert [row["max_tasks_per_step"] for row in result["rows"]] == [None] * 11 + [5] * 5
    for row in result["rows"]:
        ratio = row["ratio_to_plain"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert "with the regularizer, 5 sampled" in printed
    assert "published loop adds" in printed
    assert "of the time of TorchJD" in printed


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main([*TINY, "--tasks", "3", "--memory-of", "regularizer"]) == 0
    assert float(capsys.readouterr().out) >= 0


@pytest.mark.parametrize("options", [["--steps", "0"], ["--tasks", "many"], ["--threads", "-1"]])
def test_bad_options(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(options)
