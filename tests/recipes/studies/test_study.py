"""Studies: every training once, choices by validation, statistics over seeds."""

import dataclasses
import itertools
import json
import math
import statistics

import numpy as np
import pytest

from recipes.methods.methods import METHODS
from recipes.runtime.errors import OptionError
from recipes.studies.study import Cell, Setting, Statistic
from recipes.studies.trials import Range

from ..support.small_study import BASE, GRIDS, OURS, Trained, in_turn, plain, setting, study

DEFAULT, OTHER = METHODS["srdml_default"], METHODS["pcgrad"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


class TestRun:
    def test_every_training_once(self, path):
        train = Trained(plain)
        ours = study(path)
        assert (ours.done, ours.trainings) == (0, 2 * 2 * 2 + 2 * 3)
        assert [cell for cell, _ in ours.run(in_turn, train)] == train.cells
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
        assert ours.tuning(one, OURS) == [(0.01, 0.7)]
        assert ours.reported(one, OURS) == {}

    def test_test_split_has_no_say(self, path):
        def train(cell):
            return {**plain(cell), "macro": {"accuracy": 1 - plain(cell)["validation"]}}

        ours = study(path)
        list(ours.run(in_turn, Trained(train)))
        assert ours.chosen(ours.settings[0], BASE) == 0.5


class TestDecayOfTheBaseline:
    def decayed(self, path, *methods, **more):
        own = setting(methods=methods)
        return study(path, dataclasses.replace(own, decay_of_baseline=True), **more)

    def test_trials_wait_and_have_it_in_their_keys(self, path):
        train = Trained(plain)
        ours = self.decayed(path, "hard_sharing", "srdml")
        list(ours.run(in_turn, train))
        assert ours.done == ours.trainings == len(train.cells) == 14
        order = [(cell.method.key, cell.setting.values.get("weight_decay")) for cell in train.cells[:8]]
        assert order == [("hard_sharing", None)] * 4 + [("srdml", 0.5)] * 4
        assert {cell.to_dict()["weight_decay"] for cell in train.cells if cell.method is OURS} == {0.5}
        assert len(ours.reported(ours.settings[0], OURS)) == 3

    def test_multiplied(self, path):
        train = Trained(plain)
        own = setting(methods=("hard_sharing", "srdml", "srdml_default"))
        list(study(path, dataclasses.replace(own, decay_of_baseline=True, decay_factor=0.2)).run(in_turn, train))
        decays = {cell.method.key: cell.setting.values.get("weight_decay") for cell in train.cells}
        assert decays == {"hard_sharing": None, "srdml": 0.1, "srdml_default": 0.1}

    def test_not_chosen_before_the_baseline(self, path):
        ours = self.decayed(path, "hard_sharing", "srdml")
        list(ours.run(in_turn, Trained(plain, until=3)))
        one = ours.settings[0]
        assert (ours.chosen(one, OURS), ours.tuning(one, OURS), ours.reported(one, OURS)) == (None, [], {})

    def test_baseline_is_tuned_where_it_is_not_compared(self, path):
        train = Trained(plain)
        ours = self.decayed(path, "srdml")
        list(ours.run(in_turn, train))
        assert ours.done == ours.trainings == len(train.cells) == 4 + 4 + 3
        assert not [cell for cell in train.cells if cell.reported and cell.method is BASE]

    def test_method_that_is_not_tuned(self, path):
        """Only ever the decay of the baseline, no trials, and no other key for the others."""
        train, others = Trained(plain), Trained(plain)
        values = {"weight_decay": 0.05}
        ours = study(path, setting(methods=("hard_sharing", "srdml", "srdml_default"), **values))
        list(ours.run(in_turn, train))
        default = [cell for cell in train.cells if cell.method is DEFAULT]
        assert [(cell.reported, cell.value) for cell in default] == [(True, DEFAULT.fixed)] * 3
        assert {cell.setting.values["weight_decay"] for cell in default} == {0.5}
        list(study(path.with_name("others"), setting(**values)).run(in_turn, others))
        kept = [cell.to_dict() for cell in train.cells if cell.method is not DEFAULT]
        assert kept == [cell.to_dict() for cell in others.cells]
        one = ours.settings[0]
        assert ours.chosen(one, DEFAULT) == DEFAULT.fixed
        assert ours.trainings == ours.done == 17


def test_share_is_another_parameter():
    own = Setting("one", "One", {"penalty": "share"}, ("srdml",), {"share, l1": (1.0, 3.0)})
    assert Cell(own, OURS, 1.0, 0, True).to_dict()["parameter"] == own.parameter(OURS) == "share, l1"
    assert own.space(OURS) == (1.0, 3.0)
    assert own.parameter(BASE) == "weight decay"
    assert own.has_space(DEFAULT)
    assert not own.has_space(METHODS["srdml_cosine"])


class TestStatistics:
    def of(self, tmp_path, numbers):
        """Of one method whose reported accuracies these are, and of its difference to a baseline of zeros."""
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"

        def train(cell):
            accuracy = numbers[cell.seed] if cell.reported and cell.method is OURS else 0.0
            return {"validation": 0.5, "macro": {"accuracy": accuracy}}

        ours = study(path, seeds=len(numbers))
        list(ours.run(in_turn, Trained(train)))
        (one,) = ours.settings
        summary = ours.summary(one, OURS, ["accuracy"])["accuracy"]
        # As text, in which NaN is equal.
        assert repr(ours.difference(one, OURS, ["accuracy"])["accuracy"]) == repr(summary)
        assert ours.difference(one, BASE, ["accuracy"]) == {}
        assert ours.difference(one, OURS, ["accuracy"], reference=OURS) == {}
        turned = ours.difference(one, BASE, ["accuracy"], reference=OURS)["accuracy"]
        assert repr(-turned.mean) == repr(summary.mean) or math.isnan(summary.mean) or turned.mean == summary.mean == 0
        return summary

    @staticmethod
    def slow_interval(numbers):
        """Of all means of as many draws, each as likely as every other one."""
        means = sorted(statistics.fmean(drawn) for drawn in itertools.product(numbers, repeat=len(numbers)))
        return [float(np.percentile(means, percent)) for percent in (2.5, 97.5)]

    @pytest.mark.parametrize(
        "numbers", [(0.1, 0.4, 0.5, 0.9), (0.3, 0.31, 0.29, 0.5, 0.2), (-1.0, 0.0, 0.25, 1.2, 0.7)]
    )
    def test_interval_is_that_of_all_resamples(self, tmp_path, numbers):
        found = self.of(tmp_path, numbers)
        assert found.mean == pytest.approx(statistics.fmean(numbers))
        assert found.std == pytest.approx(statistics.stdev(numbers))
        width = max(numbers) - min(numbers)
        # 10,000 of them are drawn.
        assert [found.low, found.high] == pytest.approx(self.slow_interval(numbers), abs=0.03 * width)
        assert found.low <= found.mean <= found.high

    def test_is_the_same_in_every_order_of_the_seeds(self, tmp_path):
        found = {self.of(tmp_path, numbers) for numbers in itertools.permutations((0.1, 0.35, 0.5, 0.9))}
        assert len(found) == 1

    def test_moves_and_stretches_with_the_numbers(self, tmp_path):
        numbers = (0.1, 0.35, 0.5, 0.9)
        one = self.of(tmp_path, numbers)
        moved, stretched = (self.of(tmp_path, [f(x) for x in numbers]) for f in (lambda x: x + 2, lambda x: 3 * x))
        assert [moved.low, moved.high] == pytest.approx([one.low + 2, one.high + 2])
        assert [stretched.low, stretched.high] == pytest.approx([3 * one.low, 3 * one.high])

    def test_shrinks_with_more_seeds(self, tmp_path):
        widths = [found.high - found.low for found in (self.of(tmp_path, (0.0, 1.0) * half) for half in (2, 5, 20))]
        assert widths == sorted(widths, reverse=True)
        assert widths[-1] == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.1)

    def test_equal_numbers_leave_no_width(self, tmp_path):
        found = self.of(tmp_path, (0.1,) * 5)
        assert (found.low, found.high) == pytest.approx((0.1, 0.1), abs=1e-12)
        assert found.std == pytest.approx(0.0, abs=1e-12)

    def test_is_that_of_percentiles_also_where_the_numbers_are_skewed(self, tmp_path):
        found = self.of(tmp_path, (0.0, 0.0, 0.0, 0.0, 1.0))
        assert found.low == 0.0
        assert found.high - found.mean > found.mean - found.low

    def test_one_seed_has_no_spread(self, tmp_path):
        found = self.of(tmp_path, (0.5,))
        assert found.mean == 0.5
        assert all(map(math.isnan, (found.std, found.low, found.high)))

    def test_training_that_diverged_leaves_nothing(self, tmp_path):
        assert all(map(math.isnan, vars(self.of(tmp_path, (0.5, math.nan, 0.4))).values()))

    def test_pairs_are_those_of_a_seed(self, path):
        """With other seeds done for the one method than for the other."""
        ours = study(path, seeds=3)
        list(ours.run(in_turn, Trained(plain, until=8 + 5)))
        (one,) = ours.settings
        assert [set(ours.reported(one, method)) for method in (BASE, OURS)] == [{0, 1, 2}, {0, 1}]
        found = ours.difference(one, OURS, ["accuracy"])["accuracy"]
        assert (found.mean, found.std) == pytest.approx((0.075, 0.05 / 2**0.5))

    def test_macro_figure_that_is_not_there(self, path):
        ours = study(path)
        list(ours.run(in_turn, Trained(plain)))
        assert math.isnan(ours.summary(ours.settings[0], OURS, ["recall"])["recall"].mean)
        assert isinstance(ours.summary(ours.settings[0], OURS, ["nmse"])["nmse"], Statistic)


class TestSpaces:
    def test_are_found_by_key_then_by_parameter_then_by_its_kind(self):
        spaces = {"srdml": (1,), "strength, cosine": (2,), "strength": (3,), "weight decay": (4,)}
        own = Setting("one", "One", {}, (), spaces)
        expected = {
            "srdml": 1,
            "srdml_cosine": 2,
            "srdml_authors": 3,
            "srdml+pcgrad": 3,
            "pcgrad": 4,
            "hard_sharing": 4,
        }
        assert {key: own.space(METHODS[key])[0] for key in expected} == expected
        assert all(own.has_space(method) for method in METHODS.values())
        assert not Setting("one", "One", {}, (), GRIDS).has_space(METHODS["srdml_sqchordal"])

    def test_searched_ones_have_the_bounds_of_the_grids(self):
        grids = {"weight decay": (0.0, 0.05, 0.5), "strength, l1": (0.1, 0.01), "strength, cosine": (0.3,)}
        own = Setting("one", "One", {"a": 1}, ("srdml",), grids).searched(7)
        assert own.spaces == {
            "weight decay": Range(0.05, 0.5, 7),
            "strength, l1": Range(0.01, 0.1, 7),
            "strength, cosine": (0.3,),
        }
        assert (own.key, own.label, own.values, own.methods) == ("one", "One", {"a": 1}, ("srdml",))
        assert own.searched(7) == own

    def test_nothing_to_search_between(self):
        with pytest.raises(OptionError, match="between the values 0, 1 of the weight decay. Pass two values above 0"):
            Setting("one", "One", {}, (), {"weight decay": (0.0, 1.0)}).searched(3)

    def test_single_value_needs_no_trial(self, path):
        train = Trained(plain)
        own = Setting("one", "One", {}, ("hard_sharing", "srdml"), {"weight decay": (0.5,), "strength": (0.01, 0.1)})
        ours = study(path, own, seeds=2, tuning_seeds=3)
        assert ours.trainings == 2 + 2 * 3 + 2
        list(ours.run(in_turn, train))
        assert [cell.reported for cell in train.cells if cell.method is BASE] == [True, True]
        assert ours.tuning(own, BASE) == []


class TestSearch:
    @pytest.fixture
    def own(self):
        spaces = {"weight decay": (0.01, 0.5), "strength": (0.01, 0.1)}
        return Setting("one", "One", {"key": "one"}, ("hard_sharing", "srdml"), spaces).searched(6)

    @staticmethod
    def train(cell):
        """Best at 0.05."""
        return {"validation": -abs(math.log(cell.value / 0.05)), "macro": {"accuracy": 0.5, "nmse": 1.0}}

    def test_each_method_tries_as_many_and_all_seeds_try_them(self, path, own):
        train = Trained(self.train)
        ours = study(path, own)
        assert ours.trainings == 2 * (6 * 2 + 3)
        list(ours.run(in_turn, train))
        assert len(train.cells) == ours.done == ours.trainings
        for method in (BASE, OURS):
            tried = [
                [cell.value for cell in train.cells if cell.method is method and cell.seed == seed]
                for seed in (1000, 1001)
            ]
            assert tried[0] == tried[1]
            assert len(set(tried[0])) == 6
            low, high = own.space(method).low, own.space(method).high
            assert all(low <= value <= high for value in tried[0])
            assert ours.chosen(own, method) == max(tried[0], key=lambda value: -abs(math.log(value / 0.05)))

    @pytest.mark.parametrize("until", [1, 5, 11, 24, 27])
    def test_goes_on_where_it_was_stopped_with_the_same_values(self, path, tmp_path, own, until):
        whole, first, second = Trained(self.train), Trained(self.train, until), Trained(self.train)
        list(study(tmp_path / "whole.jsonl", own).run(in_turn, whole))
        list(study(path, own).run(in_turn, first))
        list(study(path, own).run(in_turn, second))
        assert len(first.cells) == until
        both, alone = (
            [json.dumps(cell.to_dict()) for cell in cells] for cells in (first.cells + second.cells, whole.cells)
        )
        assert sorted(both) == sorted(alone)

    def test_diverged_trainings_do_not_stop_it(self, path, own):
        train = Trained(lambda cell: {"validation": None, "macro": {"accuracy": None, "nmse": None}})
        ours = study(path, own)
        list(ours.run(in_turn, train))
        assert ours.done == ours.trainings
