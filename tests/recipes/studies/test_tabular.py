"""SARCOS and School, run for real on a few rows of their own."""

import dataclasses
import pickle
import time
from pathlib import Path

import pytest

from recipes import tabular
from recipes.data.tabular import fingerprint
from recipes.methods.methods import METHODS
from recipes.runtime.processes import Ranks, started_ranks
from recipes.studies.cell_training import CellTraining, cell_options
from recipes.studies.results_file import ResultsFile, key_of
from recipes.studies.study import Cell, Setting
from recipes.studies.tabular_cells import train_tabular
from recipes.training.options import Options
from tests.support.two_processes import run_on_two_processes

from ..support.commands import call
from ..support.small_images import write_tables
from ..support.small_training import as_rank
from ..support.studies import lines_of, results_of, tables_of

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
KEYS = ("hard_sharing", "srdml", "pcgrad")


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
    place = ("--results", results, "--seeds", "2", "--tuning-seeds", "1", "--workers", "1")
    return call(COMMAND.main, *place, *(() if data is None else ("--data", data)), *arguments)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """File and printed text of a whole study."""
    path = tmp_path_factory.mktemp("study") / "results.jsonl"
    answer = run(data, path)
    assert answer.code == 0, answer.err
    return path, answer.out


@dataclasses.dataclass
class _Plain:
    rank: int

    def to_dict(self):
        return {"validation": 0.25 + self.rank, "macro": {}}


def _result_on_rank(rank, cell, deadlines, folder):
    as_rank(rank)
    with started_ranks() as state:
        deadline = time.time() + (60 if deadlines[rank] == "later" else -60)
        work = CellTraining(lambda *_: _Plain(rank), None, "", Path(folder), deadline, ranks=Ranks(state))
        _, result, _ = work(cell)
        return None if result is None else result["validation"]


class TestCommand:
    def test_tables(self, finished):
        path, printed = finished
        assert len(results_of(path)) == 2 * (3 * 2 + 3 * 2)
        assert "### SARCOS\n\n| method | tuned | seeds | nMSE (lower is better) | difference in nMSE |\n" in printed
        assert f"24 of 24 trainings are done. Results: {path}\n" in printed
        assert "not done" not in printed
        names = {f"results.{kind}" for kind in ("jsonl", "json", "md", "csv")} | {"report.html", ".lock"}
        assert {own.name for own in path.parent.iterdir()} == names, "no checkpoints, and no pictures of numbers"

    def test_goes_on_after_the_time_is_up_and_after_a_kill(self, data, finished, tmp_path):
        whole, printed = finished
        path = tmp_path / "results.jsonl"
        # Half of the results, and half a line.
        lines = whole.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:5]) + lines[5][:50])
        with pytest.warns(UserWarning, match="half a line"):
            none = run(data, path, "--minutes", "1e-9")
        assert none.code == 0
        assert "5 of 24 trainings are done" in none.out
        assert "| PCGrad (feature) | not done | 0 of 2 | - | - |" in none.out
        with pytest.warns(UserWarning, match="half a line"):
            again = run(data, path, "--minutes", "5")
        assert again.code == 0
        assert tables_of(again.out) == tables_of(printed)
        assert results_of(path) == results_of(whole)
        assert path.read_bytes().startswith(b"".join(lines[:5]))

    def test_tables_alone_need_no_data_and_write_nothing(self, finished, tmp_path):
        path, printed = finished
        before = {own: own.stat().st_mtime_ns for own in path.parent.iterdir()}
        answer = run(None, path, "--minutes", "0")
        assert answer.code == 0
        assert tables_of(answer.out) == tables_of(printed)
        assert answer.out.endswith(f"24 of 24 trainings are done. Results: {path}\n")
        assert {own: own.stat().st_mtime_ns for own in path.parent.iterdir()} == before
        nothing = run(None, tmp_path / "none" / "results.jsonl", "--minutes", "0")
        assert nothing.code == 0
        assert "0 of 24 trainings are done" in nothing.out
        assert not (tmp_path / "none").exists()

    def test_one_setting(self, finished):
        path, printed = finished
        some = run(None, path, "--settings", "school", "--minutes", "0").out
        assert "SARCOS" not in some
        assert "12 of 12 trainings are done" in some
        assert some.split("\n\n")[1] in printed

    def test_data_are_needed_for_trainings(self, tmp_path):
        answer = run(None, tmp_path / "results.jsonl")
        assert answer.code == 2
        assert "argument --data: needed for the trainings that are missing. Use folder" in answer.complaint

    def test_folder_that_is_not_there(self, tmp_path):
        answer = run(str(tmp_path / "nowhere"), tmp_path / "out" / "results.jsonl")
        assert answer.code == 1
        assert "tabular: error: found no parquet files in" in answer.complaint
        assert "Traceback" not in answer.err

    def test_results_of_other_data(self, finished, tmp_path):
        path, _ = finished
        before = lines_of(path)
        answer = run(write_tables(tmp_path / "other", rows=80), path, "--seeds", "3")
        assert answer.code == 2
        assert "are of other data than" in answer.complaint
        assert lines_of(path) == before

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--settings", "scool"], 2, "argument --settings: found 'scool'. Use some of sarcos, school"),
            (["--settings", "school", "school"], 2, "argument --settings: the same value twice"),
            (["--methods", "srdml_cosine"], 2, "sarcos has no values to try for the strength, cosine of srdml_cosine"),
            (["--minutes", "-1"], 2, "Pass a finite number from 0 on"),
            (["--seeds", "0"], 2, "Pass a whole number from 1 on"),
            (["--trials", "4"], 1, "nothing to search between the values 0, 0.5 of the weight decay"),
            (["--methods", "single_task"], 2, "single_task has an architecture that this recipe cannot build"),
        ],
    )
    def test_bad_options(self, data, tmp_path, arguments, code, message):
        answer = run(data, tmp_path / "out" / "results.jsonl", *arguments)
        assert answer.code == code
        assert message in answer.complaint
        assert "Traceback" not in answer.err
        assert not (tmp_path / "out" / "results.jsonl").exists()


class TestCell:
    @pytest.mark.parametrize("key", SETTINGS)
    def test_only_reported_ones_see_the_test_split(self, data, key, tmp_path):
        work = CellTraining(train_tabular, data, fingerprint(data), tmp_path)
        for reported in (False, True):
            cell = Cell(SETTINGS[key], METHODS["srdml"], 0.1, 0, reported)
            same, result, about = work(cell)
            assert same == cell
            assert bool(result["scores"]) is reported
            assert about["data"] == fingerprint(data)
        assert len(result["relations"]) == len(result["scores"]) == {"sarcos": 7, "school": 5}[key]

    def test_other_processes_can_have_it(self, data, tmp_path):
        cell = Cell(SETTINGS["sarcos"], METHODS["pcgrad"], 0.5, 0, False)
        work = CellTraining(train_tabular, data, "", tmp_path)
        train, same = pickle.loads(pickle.dumps((work, cell)))
        assert same == cell
        assert train(same)[1] == work(cell)[1]

    def test_none_begins_after_the_deadline(self, data, tmp_path):
        cell = Cell(SETTINGS["sarcos"], METHODS["pcgrad"], 0.0, 0, False)
        assert CellTraining(train_tabular, data, "", tmp_path, time.time() - 1)(cell) == (cell, None, {})

    def test_main_process_alone_looks_at_the_clock_and_has_the_result(self, tmp_path):
        """Others that went on, or chose other values by their own rounding, would wait for ever."""
        cell = Cell(SETTINGS["sarcos"], METHODS["pcgrad"], 0.0, 0, False)
        for deadlines, expected in ((("later", "past"), 0.25), (("past", "later"), None)):
            answers = run_on_two_processes(_result_on_rank, cell, deadlines, str(tmp_path))
            assert answers == [expected, expected]

    def test_checkpoints_of_other_data_are_left_alone(self, tmp_path):
        cell = Cell(SETTINGS["sarcos"], METHODS["srdml"], 0.1, 0, False)
        folders = []
        for fingerprint_of_data in ("abc", "def"):
            work = CellTraining(lambda _cell, _data, folder: folders.append(folder) or _Plain(0), None, "", tmp_path)
            dataclasses.replace(work, fingerprint=fingerprint_of_data)(cell)
        assert folders[0] != folders[1]
        for folder in folders:
            folder.mkdir()
        results = ResultsFile(tmp_path / "results.jsonl")
        results.add(cell.to_dict(), {"validation": 0.5}, {})
        CellTraining(train_tabular, None, "def", tmp_path).forget_all(results)
        assert [folder.exists() for folder in folders] == [True, False]

    def test_options_are_those_that_the_setting_names(self):
        options = cell_options(Cell(SETTINGS["sarcos"], METHODS["srdml"], 0.1, 7, False), channels_last=True)
        assert (options.seed, options.epochs, options.batch_size) == (7, 2, 14)
        assert options.channels_last
        assert options.decay == Options().decay

    def test_checkpoints_of_finished_trainings_are_removed(self, tmp_path):
        """Also those of a run that was killed right after it had written a result; not of what is not finished."""
        finished, other = (Cell(SETTINGS["sarcos"], METHODS[key], 0.1, 0, False) for key in ("srdml", "pcgrad"))
        results = ResultsFile(tmp_path / "results.jsonl")
        results.add(finished.to_dict(), {"validation": 0.5}, {})
        folders = [tmp_path / "trainings" / key_of(cell.to_dict()) for cell in (finished, other)]
        for keeps, left in ((True, 2), (False, 1)):
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            CellTraining(train_tabular, None, "", tmp_path / "trainings", keeps=keeps).forget_all(results)
            assert sum(folder.exists() for folder in folders) == left
        assert folders[1].exists()

    def test_what_trackers_wrote_in_an_earlier_run_stays(self, tmp_path):
        cell = Cell(SETTINGS["sarcos"], METHODS["srdml"], 0.1, 0, False)
        results = ResultsFile(tmp_path / "results.jsonl")
        results.add(cell.to_dict(), {"validation": 0.5}, {})
        folder = tmp_path / "trainings" / key_of(cell.to_dict())
        (folder / "checkpoint-00000002").mkdir(parents=True)
        (folder / "log.jsonl").write_text("{}\n")
        (folder / "charts").mkdir()
        work = CellTraining(train_tabular, None, "", tmp_path / "trainings")
        work.forget_all(results)
        assert folder.exists()
        (folder / "charts").rmdir()
        work.forget_all(results)
        assert not folder.exists()
