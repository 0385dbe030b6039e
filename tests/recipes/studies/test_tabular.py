"""SARCOS and School, run for real on a few rows of their own."""

import contextlib
import dataclasses
import io
import json
import pickle
import time

import pytest
import torch

from recipes import tabular
from recipes.data.tabular import fingerprint, sarcos_splits, school_splits
from recipes.methods.methods import METHODS
from recipes.runtime.errors import DataError, OptionError
from recipes.studies.study import Cell, Setting
from recipes.tabular import TabularCell

from .small_images import write_parquet, write_tables

pytestmark = pytest.mark.usefixtures("quiet_hub")

COMMON = {
    "version": 1,
    "activation": "gelu",
    "width": 8,
    "head_width": 4,
    "learning_rate": 3e-3,
    "weight_decay": 0.05,
    "evaluations": 2,
    "epochs": 2,
    "batch_size": 14,
}
GRIDS = {"weight decay": (0.0, 0.5), "strength, l1": (0.01, 0.1)}
KEYS = ("hard_sharing", "srdml_entropic", "pcgrad")


def tiny(key, **values):
    return Setting(key, key.upper(), {**COMMON, "data": key, **values}, KEYS, GRIDS)


SETTINGS = {
    "sarcos": tiny("sarcos", rows_per_task=4, validation_rows=30),
    "school": tiny("school", validation_share=0.25),
}
COMMAND = dataclasses.replace(tabular.COMMAND, settings=SETTINGS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"))


def run(data, results, *arguments):
    place = ["--results", str(results), "--seeds", "2", "--tuning-seeds", "1", "--workers", "1"]
    if data is not None:
        place += ["--data", data]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = COMMAND.main([*place, *arguments])
    return code, printed.getvalue()


def cells(path):
    """Results by what they depend on, without times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {json.dumps(line["cell"]): line["result"] for line in lines}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """File and printed text of a whole study."""
    path = tmp_path_factory.mktemp("study") / "results.jsonl"
    code, printed = run(data, path)
    assert code == 0
    return path, printed


class TestCommand:
    def test_tables(self, finished):
        path, printed = finished
        assert len(cells(path)) == 2 * (3 * 2 + 3 * 2)
        assert "### SARCOS\n\n| method | tuned | seeds | nMSE (lower is better) | difference in nMSE |\n" in printed
        assert printed.endswith(f"24 of 24 trainings are done. Results: {path}\n")
        assert "not done" not in printed

    def test_goes_on_after_the_time_is_up_and_after_a_kill(self, data, finished, tmp_path):
        whole, printed = finished
        path = tmp_path / "results.jsonl"
        # Half of the results, and half a line.
        lines = whole.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:5]) + lines[5][:50])
        with pytest.warns(UserWarning, match="half a line"):
            code, none = run(data, path, "--minutes", "1e-9")
        assert code == 0
        assert "5 of 24 trainings are done" in none
        assert "| PCGrad (feature) | not done | 0 of 2 | - | - |" in none
        with pytest.warns(UserWarning, match="half a line"):
            code, again = run(data, path, "--minutes", "5")
        assert code == 0
        assert again.replace(str(path), "") == printed.replace(str(whole), "")
        assert cells(path) == cells(whole)
        assert path.read_bytes().startswith(b"".join(lines[:5]))

    def test_tables_alone_need_no_data_and_write_nothing(self, finished, tmp_path):
        path, printed = finished
        before = path.stat().st_mtime_ns
        assert run(None, path, "--minutes", "0") == (0, printed)
        assert path.stat().st_mtime_ns == before
        code, nothing = run(None, tmp_path / "none" / "results.jsonl", "--minutes", "0")
        assert code == 0
        assert "0 of 24 trainings are done" in nothing
        assert not (tmp_path / "none").exists()

    def test_one_setting(self, finished):
        path, printed = finished
        _, some = run(None, path, "--settings", "school")
        assert "SARCOS" not in some
        assert "12 of 12 trainings are done" in some
        assert some.split("\n\n")[1] in printed

    def test_data_are_needed_for_trainings(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as stop:
            run(None, tmp_path / "results.jsonl")
        assert stop.value.code == 2
        assert "argument --data: needed for the trainings that are missing. Use folder" in capsys.readouterr().err

    def test_folder_that_is_not_there(self, tmp_path, capsys):
        assert run(str(tmp_path / "nowhere"), tmp_path / "out" / "results.jsonl")[0] == 1
        complaint = capsys.readouterr().err
        assert "tabular: error: found no parquet files in" in complaint
        assert "Traceback" not in complaint

    def test_results_of_other_data(self, finished, tmp_path, capsys):
        path, _ = finished
        with pytest.raises(SystemExit) as stop:
            run(write_tables(tmp_path / "other", rows=80), path, "--seeds", "3")
        assert stop.value.code == 2
        assert "are of other data than" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--settings", "scool"], "invalid choice: 'scool'"),
            (["--minutes", "-1"], "Pass a finite number from 0 on"),
            (["--seeds", "0"], "Pass a whole number from 1 on"),
        ],
    )
    def test_bad_options(self, data, tmp_path, capsys, arguments, message):
        with pytest.raises(SystemExit) as stop:
            run(data, tmp_path / "out" / "results.jsonl", *arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


class TestCell:
    @pytest.mark.parametrize("key", SETTINGS)
    def test_only_reported_ones_see_the_test_split(self, data, key):
        for reported in (False, True):
            cell = Cell(SETTINGS[key], METHODS["srdml_entropic"], 0.1, 0, reported)
            same, result, about = TabularCell(data)(cell)
            assert same == cell
            assert bool(result["scores"]) is reported
            assert about["data"] == fingerprint(data)
        assert len(result["relations"]) == len(result["scores"]) == {"sarcos": 7, "school": 5}[key]

    def test_other_processes_can_have_it(self, data):
        cell = Cell(SETTINGS["sarcos"], METHODS["pcgrad"], 0.5, 0, False)
        train, same = pickle.loads(pickle.dumps((TabularCell(data), cell)))
        assert same == cell
        assert train(same)[1] == TabularCell(data)(cell)[1]

    def test_none_begins_after_the_deadline(self, data):
        cell = Cell(SETTINGS["sarcos"], METHODS["pcgrad"], 0.0, 0, False)
        assert TabularCell(data, time.time() - 1)(cell) == (cell, None, {})


class TestData:
    def test_sarcos(self, data):
        splits = sarcos_splits(f"{data}/sarcos", seed=0, rows_per_task=4, validation_rows=30)
        known = ~torch.isnan(splits.train.labels)
        assert known.sum(0).tolist() == [4] * 7
        assert known.sum(1).tolist() == [1] * 28
        assert not torch.isnan(splits.validation.labels).any()
        assert splits.validation.labels.shape == (30, 7)
        assert splits.test.labels.shape == (30, 7)
        assert torch.allclose(splits.train.inputs.mean(0), torch.zeros(21), atol=1e-5)
        assert torch.allclose(splits.train.inputs.std(0), torch.ones(21), atol=1e-5)
        for joint, kind in enumerate(splits.kinds.values()):
            own = splits.train.labels[known[:, joint], joint]
            assert (kind.mean, kind.spread) == pytest.approx((float(own.mean()), float(own.std())), rel=1e-4)
        rows = torch.cat([splits.train.inputs, splits.validation.inputs])
        assert len(torch.unique(rows, dim=0)) == 58, "no row twice"

    def test_school(self, data):
        splits = school_splits(f"{data}/school", seed=0, validation_share=0.25)
        assert list(splits.kinds) == [f"school {number}" for number in range(1, 6)]
        assert (~torch.isnan(splits.train.labels)).sum(0).tolist() == [9] * 5
        assert (~torch.isnan(splits.validation.labels)).sum(0).tolist() == [3] * 5
        for own in (splits.train, splits.validation, splits.test):
            assert ((~torch.isnan(own.labels)).sum(1) == 1).all()
            assert torch.isfinite(own.inputs).all()
        assert len(set(splits.kinds.values())) == 1, "one mean and spread for all schools"

    def test_seed_draws_the_rows_and_leaves_the_test(self, data):
        one, same, other = (
            sarcos_splits(f"{data}/sarcos", seed=seed, rows_per_task=4, validation_rows=30) for seed in (0, 0, 1)
        )
        assert torch.equal(one.train.inputs, same.train.inputs)
        assert not torch.equal(one.train.inputs, other.train.inputs)
        assert torch.equal(one.test.labels, other.test.labels)

    def test_more_rows_than_there_are(self, data):
        with pytest.raises(
            OptionError, match="7 tasks of 10 rows and 30 validation rows were asked for, but there are 90"
        ):
            sarcos_splits(f"{data}/sarcos", seed=0, rows_per_task=10, validation_rows=30)

    def test_columns_that_are_missing_or_not_finite(self, tmp_path):
        for split in ("train", "test"):
            write_parquet(tmp_path / "columns" / f"{split}.parquet", {"score": [1.0], "school": [1]})
            full = {f"x{number:02d}": [0.0, 1.0] for number in range(28)}
            values = {**full, "score": [1.0, float("nan")], "school": [1, 1]}
            write_parquet(tmp_path / "values" / f"{split}.parquet", values)
            write_parquet(
                tmp_path / "schools" / f"{split}.parquet",
                {**full, "score": [1.0, 2.0], "school": [1, 1] if split == "train" else [1, 2]},
            )
            write_parquet(tmp_path / "none" / f"{split}.parquet", {**values, "score": [1.0, None]})
        for name, message in (
            ("columns", "has no columns x00, x01"),
            ("values", "has values that are not finite"),
            ("schools", r"schools without training rows: \[2\]"),
            ("none", "not finite|no numbers"),
        ):
            with pytest.raises(DataError, match=message):
                school_splits(str(tmp_path / name), seed=0, validation_share=0.5)
