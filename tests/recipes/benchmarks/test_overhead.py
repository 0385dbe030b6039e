"""The overhead recipe on a tiny model: its steps do what they say, and the table and the file come out."""

from __future__ import annotations

import copy
import functools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recipes import overhead
from recipes.benchmarks.collectives import collective_row, timed_collectives
from recipes.benchmarks.steps import ManyHeads, Steps, make_data
from recipes.benchmarks.timing import time_in_turn
from recipes.runtime.errors import RecipeError
from tests.support.two_processes import run_on_two_processes

TINY = ["--steps", "3", "--warmup", "1", "--slow-steps", "2", "--width", "2", "--size", "32", "--batch-size", "2"]


def test_the_published_loop_and_the_regularizer_take_the_same_step() -> None:
    """In the first step the relations are uniform, so both are the same penalty, computed in two ways."""
    torch.manual_seed(0)
    model = ManyHeads(3, width=2).double()
    images, labels = (tensor.double() for tensor in make_data(3, 4, 32))
    after = {}
    for name in ("plain", "regularizer", "loop"):
        twin = copy.deepcopy(model)
        getattr(Steps(twin, images, labels), name)()()
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
        getattr(Steps(twin, images, labels), name)()()
        after[name] = torch.nn.utils.parameters_to_vector(twin.parameters())
    for name in ("torchjd", "textbook"):
        torch.testing.assert_close(after[name], after["parameters"], rtol=1e-9, atol=1e-12)
    different = {tuple(after[name].tolist()) for name in ("plain", "parameters", "surgery")}
    assert len(different) == 3


def test_steps_take_turns_and_the_first_rounds_do_not_count() -> None:
    taken: list[str] = []
    times = time_in_turn(
        {name: functools.partial(taken.append, name) for name in "abc"},
        count=2,
        warmup=1,
        description="",
        before_each=lambda: taken.append("-"),
        quiet=True,
    )
    assert "".join(taken) == "-a-b-c" + "-b-c-a" + "-c-a-b"
    assert {name: (len(own.seconds), len(own.cpu_seconds)) for name, own in times.items()} == dict.fromkeys(
        "abc", (2, 2)
    )


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
        (3, "views", None),
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
        (12, "views", None),
        (12, "regularizer", "heads_alone"),
    ]
    assert [row["max_tasks_per_step"] for row in result["rows"]] == [None] * 12 + [5] * 6
    for row in result["rows"]:
        ratio = row["ratio_to_plain"]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert "with the regularizer, 5 sampled" in printed
    assert "published loop adds" in printed
    assert "the five views take" in printed
    assert "of the time of TorchJD" in printed


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main([*TINY, "--tasks", "3", "--memory-of", "regularizer"]) == 0
    assert float(capsys.readouterr().out) >= 0


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_collectives_of_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--processes", "2", "--tasks", "6", "--max-tasks-per-step", "4", "--out", str(tmp_path), "--name", "run"]
    assert overhead.main([*TINY, *options]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert result["options"]["processes"] == 2
    assert [(row["step"], row["collectives_per_step"]) for row in result["rows"]] == [
        ("regularizer", 1),
        ("regularizer_surgery", 2),  # a second one in the backward pass
    ]
    for row in result["rows"]:
        assert (row["tasks"], row["max_tasks_per_step"], row["processes"], row["steps_counted"]) == (6, 4, 2, 3)
        for name in ("share_of_plain", "share_of_step", "ratio_to_local", "cpu_ratio_to_local", "ratio_to_plain"):
            assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"], name
        assert row["median_seconds_in_collectives"] > 0
        assert row["cpu_share_of_plain"]["median"] >= 0
    assert "regularizer w/ PCGrad (feature), 4 sampled" in printed
    assert "inside the regularizer's collectives" in printed


def _calls_that_are_timed(rank: int) -> list[Any]:
    group, waiting = dist.new_group(), dist.new_group()
    plain = dist.all_reduce
    total = torch.ones(2)
    with timed_collectives(group, waiting) as calls:
        dist.all_reduce(total)  # as DistributedDataParallel, in another group
        others = len(calls)
        if rank == 0:
            time.sleep(0.3)
        dist.all_reduce(total, group=group)
    dist.all_reduce(total, group=group)
    return [others, calls, dist.all_reduce is plain, total.tolist()]


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_only_the_collectives_of_the_group_are_timed_and_without_waiting() -> None:
    found = run_on_two_processes(_calls_that_are_timed)
    for others, calls, restored, total in found:
        assert (others, len(calls), restored, total) == (0, 1, True, [8.0, 8.0])
    ((came, began, ended, _),), ((came_of_other, began_of_other, ended_of_other, _),) = found[0][1], found[1][1]
    assert began_of_other - came_of_other > 0.2 > max(began - came, ended - began, ended_of_other - began_of_other)


def test_seconds_count_from_when_the_last_process_came() -> None:
    one, other = [(0.0, 1.0, 6.0, 0.5), (10.0, 11.0, 14.0, 0.5)], [(0.0, 4.0, 5.0, 0.1), (10.0, 12.0, 13.0, 0.1)]
    found = []
    for calls in (one, other):
        steps = {"seconds": [20.0], "cpu_seconds": [2.0], "calls": [[]]}
        found.append(dict.fromkeys(("plain", "regularizer", "regularizer_local"), steps))
        found[-1]["regularizer_timed"] = {"calls": [calls]}
    row = collective_row("regularizer", 3, None, found)
    assert row["median_seconds_in_collectives"] == 2 + 2
    assert row["median_seconds_waited_before"] == (1 + 1 + 4 + 2) / 2
    assert row["share_of_plain"] == {"median": 4 / 20, "low": 4 / 20, "high": 4 / 20}
    assert row["cpu_share_of_plain"]["median"] == pytest.approx((1 + 0.2) / 2 / 2)


def test_a_step_without_collectives_is_an_error() -> None:
    kinds = ("plain", "regularizer", "regularizer_local", "regularizer_timed")
    found = {kind: {"seconds": [1.0], "cpu_seconds": [1.0], "calls": [[]]} for kind in kinds}
    with pytest.raises(RecipeError, match="called none of all_reduce, broadcast, all_gather_object"):
        collective_row("regularizer", 3, None, [found, found])


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--steps", "0"], "Pass a whole number from 1 on, such as 3."),
        (["--tasks", "many"], "found 'many'. Pass a whole number from 1 on, such as 3."),
        (["--threads", "-1"], "Pass a whole number from 1 on, such as 3."),
        (["--slow-steps", "-1"], "Pass a whole number from 0 on, such as 2."),
        (["--processes", "0"], "found '0'. Pass a whole number from 1 on, such as 3."),
        (["--processes", "two"], "found 'two'. Pass a whole number from 1 on, such as 3."),
    ],
)
def test_bad_options(options: list[str], advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.main(options)
    assert advice in " ".join(capsys.readouterr().err.split())


def test_processes_without_gloo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        overhead.main(["--processes", "2"])
    assert "this build of torch has no gloo. Use --processes 1" in " ".join(capsys.readouterr().err.split())
