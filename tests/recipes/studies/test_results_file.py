"""Results that are computed once: a file with a line for each training."""

import errno
import json
import math
import time
import warnings
from pathlib import Path

import pytest

from recipes.runtime.errors import DataError
from recipes.studies.results_file import ResultsFile, key_of, timed

CELL = {"data": "digits", "seed": 0, "value": 0.1}
ABOUT = {"data": "abc", "seconds": 1.0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


class TestResultsFile:
    def test_result_is_found_again_by_equal_values_and_no_others(self, path):
        cells = ResultsFile(path)
        assert len(cells) == 0
        assert cells.get(CELL) is None
        cells.add(CELL, {"score": 0.5}, ABOUT)
        for found in (cells, ResultsFile(path)):
            assert len(found) == 1
            assert found.get(dict(reversed(CELL.items()))) == {"score": 0.5}, "whatever the order of the values"
            assert found.data == {ABOUT["data"]}
            for other in ({**CELL, "seed": 1}, {**CELL, "value": 0.2}, {**CELL, "more": 1}, {"data": "digits"}):
                assert found.get(other) is None

    def test_file_of_something_else_is_left_alone(self, path):
        path.write_text("notes\nof mine")
        with pytest.raises(DataError, match="is no result"):
            ResultsFile(path)
        path.write_text("notes of mine, in one line")
        with pytest.raises(DataError, match="the last line of .* is no result"):
            ResultsFile(path)
        assert path.read_text() == "notes of mine, in one line"

    def test_whole_line_without_its_end_counts(self, path):
        ResultsFile(path).add(CELL, {"score": 0.5}, ABOUT)
        path.write_bytes(path.read_bytes().rstrip())
        cells = ResultsFile(path)
        assert cells.get(CELL) == {"score": 0.5}
        cells.add({**CELL, "seed": 7}, {"score": 0.6}, ABOUT)
        assert len(path.read_text().splitlines()) == 2
        assert len(ResultsFile(path)) == 2

    def test_key_is_the_same_tomorrow(self):
        assert key_of(CELL) == "e0e557cd95bb9b8a80e9" != key_of({**CELL, "seed": 1})

    def test_half_a_line_is_dropped_and_overwritten(self, path):
        ResultsFile(path).add(CELL, {"score": 0.5}, ABOUT)
        whole = path.read_bytes()
        path.write_bytes(whole + whole[:40])
        with pytest.warns(UserWarning, match=r"results.jsonl ends in half a line, of a run that was killed"):
            cells = ResultsFile(path)
        assert path.read_bytes() == whole + whole[:40], "who only reads writes nothing"
        cells.add({**CELL, "seed": 1}, {"score": 0.25}, ABOUT)
        lines = path.read_bytes().splitlines(keepends=True)
        assert lines[0] == whole
        assert len(lines) == 2
        assert ResultsFile(path).get({**CELL, "seed": 1}) == {"score": 0.25}

    def test_only_half_a_line(self, path):
        path.write_text('{"cell": ')
        with pytest.warns(UserWarning, match="half a line"):
            cells = ResultsFile(path)
        cells.add(CELL, {"score": 1.0}, ABOUT)
        assert ResultsFile(path).get(CELL) == {"score": 1.0}

    @pytest.mark.parametrize("wrong", ["no json", "[1, 2]", '{"cell": {}}', "3"])
    def test_other_files_are_refused_with_the_line(self, path, wrong):
        ResultsFile(path).add(CELL, {"score": 0.5}, ABOUT)
        path.write_text(path.read_text() + wrong + "\n")
        with pytest.raises(DataError, match=r"line 2 of .*results.jsonl is no result .*Pass another file"):
            ResultsFile(path)

    def test_folder_instead_of_a_file(self, tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            ResultsFile(tmp_path)

    def test_what_json_has_not_becomes_nothing(self, path):
        cells = ResultsFile(path)
        cells.add(CELL, {"validation": -math.inf, "macro": {"auc": math.nan}}, ABOUT)
        for found in (cells, ResultsFile(path)):
            assert found.get(CELL) == {"validation": None, "macro": {"auc": None}}
        json.loads(path.read_text(), parse_constant=pytest.fail)

    def test_time_and_machine_are_noted(self):
        with timed("abc") as about:
            time.sleep(0.06)
        assert about["data"] == "abc"
        assert about["seconds"] >= 0.1
        assert {"date", "machine", "versions", "processor_seconds"} <= set(about)


class FullDisk:
    """Refuses to write as long as it is full."""

    def __init__(self, monkeypatch):
        self.full = True
        open_file = Path.open

        def refuse(path, mode="r", **options):
            if self.full and mode in ("wb", "r+b"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return open_file(path, mode, **options)

        monkeypatch.setattr(Path, "open", refuse)


class TestFullDisk:
    def test_results_wait_and_are_written_in_order(self, path, monkeypatch):
        disk = FullDisk(monkeypatch)
        results = ResultsFile(path)
        with pytest.warns(UserWarning, match="could not be written .No space left on device.. The run goes on"):
            results.add(CELL, {"score": 0.5}, ABOUT)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            results.add({**CELL, "seed": 1}, {"score": 0.25}, ABOUT)
            results.flush()
        assert results.not_written == "No space left on device"
        assert results.get(CELL) == {"score": 0.5}, "it is known all the same"
        assert not path.exists()
        disk.full = False
        results.add({**CELL, "seed": 2}, {"score": 0.75}, ABOUT)
        assert results.not_written is None
        assert [json.loads(line)["cell"]["seed"] for line in path.read_text().splitlines()] == [0, 1, 2]
        before = path.stat().st_mtime_ns
        results.flush()
        assert path.stat().st_mtime_ns == before, "nothing waits"

    def test_disk_that_fills_within_a_line(self, path, monkeypatch):
        """What was written of it is overwritten by the next try."""
        results = ResultsFile(path)
        results.add(CELL, {"score": 0.5}, ABOUT)
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"cell": {"da')
        results.add({**CELL, "seed": 1}, {"score": 0.25}, ABOUT)
        assert path.read_bytes().startswith(whole)
        assert len(ResultsFile(path)) == 2

    def test_who_does_not_write_keeps_results_all_the_same(self, path):
        results = ResultsFile(path, writes=False)
        results.add(CELL, {"score": 0.5}, ABOUT)
        assert results.get(CELL) == {"score": 0.5}
        assert not path.exists()
