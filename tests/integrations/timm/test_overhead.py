"""The overhead recipe on timm's smallest model: the table and the file come out; no time is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("timm")

from recipes import timm_overhead


def test_the_table_and_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--backbones", "test_resnet", "--tasks", "3", "--out", str(tmp_path), "--name", "run"]
    assert timm_overhead.main([*options, "--batch-size", "2", "--steps", "2", "--warmup", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| backbone | image | tasks | step | seconds | time over the plain step |"
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == [
        "a head for each task, with the regularizer",
        "a head for each task, with the regularizer w/ PCGrad (feature)",
        "one classifier with a column per task, with the regularizer",
        "one classifier with a column per task, with the regularizer w/ PCGrad (feature)",
    ]
    for row, line in zip(rows, lines[2:6]):
        size = row["image_size"]
        assert line.startswith(f"| test_resnet | {size}x{size} | 3 | {row['kind']} | ")
        assert row["steps_counted"] == 2
        assert 0 < row["ratio_to_plain"]["low"] <= row["ratio_to_plain"]["median"] <= row["ratio_to_plain"]["high"]
    assert "Batch 2, 1 thread(s)." in lines[-1]
