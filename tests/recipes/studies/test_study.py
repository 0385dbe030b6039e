"""Results that are computed once, and the studies that are made of them."""

import json
import math
import statistics
import time

import pytest

from recipes.methods.methods import METHODS
from recipes.runtime.errors import DataError
from recipes.studies.results_file import CellFile, key_of, timed
from recipes.studies.study import Setting, Study
from recipes.studies.tables import markdown

GRIDS = {"weight decay": (0.0, 0.5), "strength, l1": (0.01, 0.1), "strength, cosine": (0.3, 1.0)}
BASE, OURS = METHODS["hard_sharing"], METHODS["srdml_entropic"]
CELL = {"data": "digits", "seed": 0, "value": 0.1}
ABOUT = {"data": "abc", "seconds": 1.0}


def setting(key="one", methods=("hard_sharing", "srdml_entropic"), **values):
    return Setting(key, f"Setting {key}", {"key": key, **values}, methods, GRIDS)


class Trained:
    """Trains by a formula, and counts."""

    def __init__(self, formula, until=math.inf):
        self.formula = formula
        self.until = until
        self.cells = []

    def __call__(self, cell):
        if len(self.cells) >= self.until:
            return cell, None, {}
        self.cells.append(cell)
        return cell, self.formula(cell), ABOUT


def plain(cell):
    """Best at weight decay 0.5 and strength 0.01; on test, each seed is worth 0.1."""
    score = 0.5 + (0.2 if cell.value in (0.5, 0.01) else 0.0)
    accuracy = 0.5 + 0.1 * cell.seed + (0.05 * (cell.seed + 1) if cell.method.rule else 0.0)
    return {"validation": score, "macro": {"accuracy": accuracy, "nmse": 2.0} if cell.reported else {}}


def in_turn(train, cells):
    return map(train, cells)


def study(path, *settings, seeds=3, tuning_seeds=2):
    return Study(settings or [setting()], range(seeds), range(1000, 1000 + tuning_seeds), CellFile(path))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


class TestCellFile:
    def test_result_is_found_again_by_equal_values_and_no_others(self, path):
        cells = CellFile(path)
        assert len(cells) == 0
        assert cells.get(CELL) is None
        cells.add(CELL, {"score": 0.5}, ABOUT)
        for found in (cells, CellFile(path)):
            assert len(found) == 1
            assert found.get(dict(reversed(CELL.items()))) == {"score": 0.5}, "whatever the order of the values"
            assert found.data == {ABOUT["data"]}
            for other in ({**CELL, "seed": 1}, {**CELL, "value": 0.2}, {**CELL, "more": 1}, {"data": "digits"}):
                assert found.get(other) is None

    def test_file_of_something_else_is_left_alone(self, path):
        path.write_text("notes\nof mine")
        with pytest.raises(DataError, match="is no result"):
            CellFile(path)
        path.write_text("notes of mine, in one line")
        with pytest.raises(DataError, match="the last line of .* is no result"):
            CellFile(path)
        assert path.read_text() == "notes of mine, in one line"

    def test_whole_line_without_its_end_counts(self, path):
        CellFile(path).add(CELL, {"score": 0.5}, ABOUT)
        path.write_bytes(path.read_bytes().rstrip())
        cells = CellFile(path)
        assert cells.get(CELL) == {"score": 0.5}
        cells.add({**CELL, "seed": 7}, {"score": 0.6}, ABOUT)
        assert len(path.read_text().splitlines()) == 2
        assert len(CellFile(path)) == 2

    def test_key_is_the_same_tomorrow(self):
        assert key_of(CELL) == "e0e557cd95bb9b8a80e9" != key_of({**CELL, "seed": 1})

    def test_half_a_line_is_dropped_and_overwritten(self, path):
        CellFile(path).add(CELL, {"score": 0.5}, ABOUT)
        whole = path.read_bytes()
        path.write_bytes(whole + whole[:40])
        with pytest.warns(UserWarning, match=r"results.jsonl ends in half a line, of a run that was killed"):
            cells = CellFile(path)
        assert path.read_bytes() == whole + whole[:40], "who only reads writes nothing"
        cells.add({**CELL, "seed": 1}, {"score": 0.25}, ABOUT)
        lines = path.read_bytes().splitlines(keepends=True)
        assert lines[0] == whole
        assert len(lines) == 2
        assert CellFile(path).get({**CELL, "seed": 1}) == {"score": 0.25}

    def test_only_half_a_line(self, path):
        path.write_text('{"cell": ')
        with pytest.warns(UserWarning, match="half a line"):
            cells = CellFile(path)
        cells.add(CELL, {"score": 1.0}, ABOUT)
        assert CellFile(path).get(CELL) == {"score": 1.0}

    @pytest.mark.parametrize("wrong", ["no json", "[1, 2]", '{"cell": {}}', "3"])
    def test_other_files_are_refused_with_the_line(self, path, wrong):
        CellFile(path).add(CELL, {"score": 0.5}, ABOUT)
        path.write_text(path.read_text() + wrong + "\n")
        with pytest.raises(DataError, match=r"line 2 of .*results.jsonl is no result .*Pass another file"):
            CellFile(path)

    def test_folder_instead_of_a_file(self, tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            CellFile(tmp_path)

    def test_what_json_has_not_becomes_nothing(self, path):
        cells = CellFile(path)
        cells.add(CELL, {"validation": -math.inf, "macro": {"auc": math.nan}}, ABOUT)
        for found in (cells, CellFile(path)):
            assert found.get(CELL) == {"validation": None, "macro": {"auc": None}}
        json.loads(path.read_text(), parse_constant=pytest.fail)

    def test_time_and_machine_are_noted(self):
        with timed("abc") as about:
            time.sleep(0.06)
        assert about["data"] == "abc"
        assert about["seconds"] >= 0.1
        assert {"date", "machine", "versions", "processor_seconds"} <= set(about)


class TestRun:
    def test_every_training_once(self, path):
        train = Trained(plain)
        ours = study(path)
        assert (ours.done, ours.trainings) == (0, 2 * 2 * 2 + 2 * 3)
        assert list(ours.run(in_turn, train)) == train.cells
        assert len({json.dumps(cell.to_dict()) for cell in train.cells}) == len(train.cells) == ours.done == 14
        assert [cell.reported for cell in train.cells] == [False] * 8 + [True] * 6
        assert {cell.seed for cell in train.cells if cell.reported} == {0, 1, 2}
        assert {cell.seed for cell in train.cells if not cell.reported} == {1000, 1001}
        again = Trained(plain)
        assert list(study(path).run(in_turn, again)) == again.cells == []

    def test_goes_on_where_it_was_stopped(self, path):
        first = Trained(plain)
        run = study(path).run(in_turn, first)
        for _ in range(9):
            next(run)
        run.close()
        second = Trained(plain)
        ours = study(path)
        list(ours.run(in_turn, second))
        both = [cell.to_dict() for cell in first.cells + second.cells]
        assert len(both) == ours.done == 14
        assert all(own not in both[:index] for index, own in enumerate(both)), "trained twice"

    def test_more_seeds_and_settings_later(self, path):
        list(study(path, seeds=1).run(in_turn, Trained(plain)))
        more = Trained(plain)
        ours = study(path, setting(), setting("two"), seeds=2)
        list(ours.run(in_turn, more))
        assert [cell.setting.key for cell in more.cells] == ["one"] * 2 + ["two"] * 12
        assert ours.done == ours.trainings == 24

    def test_ends_when_the_time_is_up(self, path):
        train = Trained(plain, until=5)
        ours = study(path, setting(), setting("two"))
        assert len(list(ours.run(in_turn, train))) == len(train.cells) == ours.done == 5
        assert len(path.read_text().splitlines()) == 5


class TestChoice:
    def choose(self, path, scores):
        """Of three seeds and the values 0 and 0.5."""

        def train(cell):
            return {"validation": scores[cell.value][cell.seed - 1000] if not cell.reported else 0.0, "macro": {}}

        ours = study(path, setting(methods=("hard_sharing",)), tuning_seeds=3)
        list(ours.run(in_turn, Trained(train)))
        return ours.chosen(ours.settings[0], BASE)

    @pytest.mark.parametrize(
        ("scores", "best"),
        [
            ({0.0: (0.9, 0.1, 0.1), 0.5: (0.4, 0.4, 0.4)}, 0.5),
            ({0.0: (0.4, 0.4, 0.4), 0.5: (0.9, 0.1, 0.1)}, 0.0),
            ({0.0: (0.25, 0.5, 0.75), 0.5: (0.75, 0.5, 0.25)}, 0.0),
            ({0.0: (0.9, None, 0.9), 0.5: (0.0, 0.0, 0.0)}, 0.5),
            ({0.0: (0.9, None, 0.9), 0.5: (-8.0, -9.0, -9.0)}, 0.5),
            ({0.0: (None, None, None), 0.5: (None, 0.9, 0.9)}, 0.0),
        ],
        ids=["mean", "other", "ties to the first", "diverged once", "still worse than bad", "all diverged"],
    )
    def test_is_by_the_mean_over_the_seeds(self, path, scores, best):
        assert self.choose(path, scores) == best

    def test_waits_for_all_trials(self, path):
        train = Trained(plain, until=7)
        ours = study(path)
        list(ours.run(in_turn, train))
        one = ours.settings[0]
        assert ours.chosen(one, BASE) == 0.5
        assert ours.chosen(one, OURS) is None
        assert ours.tuning(one, OURS) == {0.01: 0.7}
        assert ours.reported(one, OURS) == {}

    def test_test_split_has_no_say(self, path):
        def train(cell):
            return {**plain(cell), "macro": {"accuracy": 1 - plain(cell)["validation"]}}

        ours = study(path)
        list(ours.run(in_turn, Trained(train)))
        assert ours.chosen(ours.settings[0], BASE) == 0.5


class TestTables:
    @pytest.fixture
    def finished(self, path):
        ours = study(path)
        list(ours.run(in_turn, Trained(plain)))
        return ours

    def test_means_and_paired_differences(self, finished):
        (one,) = finished.settings
        assert finished.summary(one, BASE, ["accuracy"])["accuracy"] == pytest.approx((0.6, 0.1))
        assert finished.difference(one, OURS, ["accuracy"])["accuracy"] == pytest.approx((0.1, 0.05))
        assert finished.summary(one, OURS, ["accuracy"])["accuracy"] == pytest.approx(
            (statistics.fmean((0.55, 0.7, 0.85)), 0.15)
        )

    def test_markdown(self, finished):
        lines = markdown(finished, ["accuracy", "nmse"], ["accuracy"]).splitlines()
        assert lines == [
            "### Setting one",
            "",
            "| method | tuned | seeds | accuracy % | nMSE (lower is better) | difference in accuracy |",
            "| --- | --- | --- | --- | --- | --- |",
            "| hard sharing | weight decay 0.5 | 3 | 60.00 +- 10.00 | 2.0000 +- 0.0000 | - |",
            "| SRDML, `entropic` | strength 0.01 | 3 | 70.00 +- 15.00 | 2.0000 +- 0.0000 | +10.00 +- 5.00 |",
        ]

    def test_what_is_not_done_is_said(self, path):
        ours = study(path)
        list(ours.run(in_turn, Trained(plain, until=7)))
        base, entropic = markdown(ours, ["accuracy"], ["accuracy"]).splitlines()[-2:]
        assert base == "| hard sharing | weight decay 0.5 | 0 of 3 | - | - |"
        assert entropic == "| SRDML, `entropic` | not done | 0 of 3 | - | - |"
        list(ours.run(in_turn, Trained(plain, until=4)))
        base, entropic = markdown(ours, ["accuracy"], ["accuracy"]).splitlines()[-2:]
        assert base == "| hard sharing | weight decay 0.5 | 2 of 3 | 55.00 +- 7.07 | - |"
        assert entropic == "| SRDML, `entropic` | strength 0.01 | 1 of 3 | 55.00 | +5.00 |"

    def test_training_that_diverged_has_no_mean_and_no_crash(self, path):
        def train(cell):
            broken = cell.reported and cell.method is OURS and cell.seed == 1
            return {"validation": None, "macro": {"accuracy": math.nan}} if broken else plain(cell)

        ours = study(path)
        list(ours.run(in_turn, Trained(train)))
        line = markdown(ours, ["accuracy"], ["accuracy"]).splitlines()[-1]
        assert line == "| SRDML, `entropic` | strength 0.01 | 3 | - | - |"
