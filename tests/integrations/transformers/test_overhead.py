"""The overhead recipe on a tiny shape: the table and the file come out; no time is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes import transformers_overhead

pytest.importorskip("transformers")

TINY = ["--layers", "1", "--hidden", "16", "--tokens", "5", "--batch-size", "2", "--steps", "2", "--warmup", "1"]


def test_the_table_and_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tasks", "3", "--out", str(tmp_path), "--name", "run"]
    assert transformers_overhead.main([*TINY, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == [
        "one classifier with a column per label, with the regularizer",
        "one classifier with a column per label, with the regularizer w/ PCGrad (feature)",
        "a head for each label, with the regularizer",
        "a head for each label, with the regularizer w/ PCGrad (feature)",
    ]
    for row, line in zip(rows, lines[2:6]):
        assert line.startswith(f"| 1 | 16 | 5 | 3 | {row['kind']} | ")
        assert 0 < row["ratio_to_plain"]["low"] <= row["ratio_to_plain"]["median"] <= row["ratio_to_plain"]["high"]
    assert "Batch 2, 1 thread(s)." in lines[-1]


def test_channels_that_no_attention_heads_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        transformers_overhead.main(["--hidden", "100"])
    assert "Use a multiple of 64" in capsys.readouterr().err
