"""Intervals that hold for many methods at once."""

import math
import statistics

import numpy
import pytest
from scipy import stats

from recipes.studies.comparison.report.intervals import adjusted_interval, challengers, reach
from recipes.studies.verdicts import FEW, HELPS, UNCLEAR, effect_of

from ....support.many_methods import finished

BASE = [0.80, 0.82, 0.79, 0.81, 0.83]
ONE = [0.81, 0.84, 0.80, 0.83, 0.86]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


def test_is_the_paired_t_interval_of_one_method(path):
    ours = finished(path, {"hard_sharing": BASE, "one": ONE})
    (low, high) = adjusted_interval(ours, ours.settings[0], ours.methods["one"], "auc")
    known = stats.ttest_rel(ONE, BASE).confidence_interval(0.95)
    assert (low, high) == pytest.approx((known.low, known.high), rel=1e-12)


def test_by_hand_for_several_methods(path):
    others = {f"other{index}": BASE for index in range(9)}
    ours = finished(path, {"single_task": BASE, **others, "hard_sharing": BASE, "one": ONE, "constant": [0.5] * 5})
    (one,) = ours.settings
    assert len(challengers(ours, one)) == 11, "without the baseline and the trivial model"
    differences = [a - b for a, b in zip(ONE, BASE)]
    # 0.05 / 2 / 11, four degrees of freedom.
    wide = stats.t.isf(0.025 / 11, 4) * statistics.stdev(differences) / math.sqrt(5)
    mean = statistics.fmean(differences)
    found = adjusted_interval(ours, one, ours.methods["one"], "auc")
    assert found == pytest.approx((mean - wide, mean + wide), rel=1e-9)
    assert stats.t.ppf(1 - 0.05 / (2 * 11), 4) / math.sqrt(5) == pytest.approx(reach(5, 11), rel=1e-9)


def test_the_plain_interval_is_clear_and_the_adjusted_one_is_not(path):
    others = {f"other{index}": BASE for index in range(29)}
    ours = finished(path, {"hard_sharing": BASE, "one": ONE, **others})
    effect = effect_of(ours, ours.settings[0], ours.methods["one"], "auc")
    assert (effect.kind, effect.adjusted_kind) == (HELPS, UNCLEAR)
    alone = finished(path.with_name("alone.jsonl"), {"hard_sharing": BASE, "one": ONE})
    assert effect_of(alone, alone.settings[0], alone.methods["one"], "auc").adjusted_kind == HELPS


def test_of_an_error_it_is_in_per_cent_of_the_baseline(path):
    ours = finished(path, {"hard_sharing": BASE, "one": ONE}, "nmse")
    effect = effect_of(ours, ours.settings[0], ours.methods["one"], "nmse")
    low, high = adjusted_interval(ours, ours.settings[0], ours.methods["one"], "nmse")
    base = statistics.fmean(BASE)
    assert effect.adjusted == pytest.approx((100 * low / base, 100 * high / base))


def test_all_hold_at_once():
    """Of 30 methods like the baseline one is clear of 0 in at most 5 % of the studies; of plain intervals in most."""
    generator, seeds, methods = numpy.random.default_rng(0), 5, 30
    base = generator.normal(size=(2000, seeds, 1))
    spread = numpy.geomspace(0.1, 10, methods)  # of unequal variances
    differences = generator.normal(size=(2000, seeds, methods)) * spread - base
    ratio = abs(differences.mean(1)) / differences.std(1, ddof=1)
    missed, plain = ((ratio > reach(seeds, count)).any(1).mean() for count in (methods, 1))
    assert missed < 0.05
    assert plain > 0.5


def test_too_few_seeds(path):
    assert math.isnan(reach(1, 3))
    ours = finished(path, {"hard_sharing": BASE[:2], "one": ONE[:2], "broken": [0.9, None], "late": [0.9]})
    effect = effect_of(ours, ours.settings[0], ours.methods["one"], "auc")
    assert effect.adjusted_kind == FEW
    for key in ("broken", "late"):
        low, high = adjusted_interval(ours, ours.settings[0], ours.methods[key], "auc")
        assert math.isnan(low)
        assert math.isnan(high)
    assert math.isnan(adjusted_interval(ours, ours.settings[0], ours.methods["hard_sharing"], "auc")[0])
