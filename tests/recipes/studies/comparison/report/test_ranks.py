"""Friedman's and Nemenyi's tests against the worked example and the table of Demsar (JMLR 2006)."""

import math

import numpy
import pytest
from scipy import stats

from recipes.studies.comparison.report.rank_picture import draw_ranks
from recipes.studies.comparison.report.ranks import critical_difference, ranked_methods, ranking, ranks_sentence

from ....support.many_methods import finished
from ....support.studies import size_of_png

#: Table 6 of the paper: ranks of C4.5, +m, +cf and +m+cf on 14 data sets.
RANKS = [
    *([4, 3, 2, 1], [1, 2, 3, 4], [4, 1, 2, 3], [4, 1, 3, 2], [4, 2, 3, 1], [1, 2.5, 4, 2.5], [3, 2, 4, 1]),
    *([2.5, 2.5, 4, 1], [4, 3, 2, 1], [2.5, 2.5, 2.5, 2.5], [4, 2.5, 1, 2.5], [3, 2, 4, 1], [4, 1, 2, 3], [3, 1, 4, 2]),
]
#: Table 5 of the paper, at 0.05.
Q = {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}


@pytest.mark.parametrize("methods", Q)
@pytest.mark.parametrize("blocks", [5, 14])
def test_critical_difference_of_the_published_table(methods, blocks):
    known = Q[methods] * math.sqrt(methods * (methods + 1) / (6 * blocks))
    assert critical_difference(methods, blocks) == pytest.approx(known, rel=4e-4)


def test_worked_example():
    found = ranking(RANKS, lower=True)
    assert found.means == pytest.approx((3.143, 2.000, 2.893, 1.964), abs=5e-4)
    assert found.blocks == 14
    assert found.critical == pytest.approx(1.25, abs=5e-3)
    # The paper's 9.28 and 3.69 are without the correction for ties, which scipy has: 78 of 840.
    statistic = stats.friedmanchisquare(*zip(*RANKS)).statistic
    assert statistic * (1 - 78 / 840) == pytest.approx(9.28, abs=5e-3)
    ratio = 13 * statistic / (14 * 3 - statistic)
    assert found.p == pytest.approx(stats.f.sf(ratio, 3, 39))
    assert found.p < stats.f.sf(3.69, 3, 39) < 0.05


def test_ranks_against_counting():
    values = numpy.random.default_rng(0).integers(0, 6, (7, 9)).astype(float)
    for lower in (False, True):
        signed = values if lower else -values
        slow = [
            numpy.mean([(row < row[m]).sum() + ((row == row[m]).sum() + 1) / 2 for row in signed]) for m in range(9)
        ]
        assert ranking(values, lower).means == pytest.approx(slow)


def test_a_training_that_diverged_is_the_worst():
    values = [[0.1, math.nan, 0.3], [0.2, 0.4, 0.6]]
    assert ranking(values, lower=False).means == (2.5, 2.5, 1.0)
    assert ranking(values, lower=True).means == (1.0, 2.5, 2.5)


def test_all_alike_and_all_agreed():
    assert ranking(numpy.ones((4, 3)), lower=True).p == 1.0
    assert ranking(numpy.tile([1.0, 2.0, 3.0], (4, 1)), lower=True).p == 0.0


def test_level_of_the_test():
    """Equal methods differ in 5 % of the studies."""
    generator = numpy.random.default_rng(1)
    found = [ranking(generator.normal(size=(5, 6)), lower=True).p < 0.05 for _ in range(600)]
    assert 0.02 < numpy.mean(found) < 0.08


def figures(seeds):
    """The worse the later, by more than the seeds differ."""
    keys = ("hard_sharing", "a", "b", "c", "constant")
    return {key: [0.9 - 0.1 * place + 0.01 * seed for seed in range(seeds)] for place, key in enumerate(keys)}


def test_ranked_methods(tmp_path):
    ours = finished(tmp_path / "results.jsonl", {**figures(12), "late": [0.95] * 3})
    found = ranked_methods(ours, ours.settings[0], ["nmse", "auc"])
    assert [own.key for own in found.methods] == ["hard_sharing", "a", "b", "c"], "not the trivial one, not the late"
    assert found.ranking.means == (1.0, 2.0, 3.0, 4.0)
    # 1.35: neighbours cannot be told apart.
    assert found.ranking.critical == pytest.approx(2.569 * math.sqrt(20 / 72), rel=1e-3)
    assert found.groups == [(0, 1), (1, 2), (2, 3)]
    assert ranks_sentence(ours, found) == (
        "Mean ranks in AUC over 12 seeds, 1 is best of 4: Hard sharing has 1.0. The methods do not all rank "
        "alike (Friedman's test, p < 0.001). Mean ranks can be told apart from 1.4 on (Nemenyi's test, 95 %). Clearly worse "
        "than the baseline: Method b; Method c."
    )
    draw_ranks(found, "hard_sharing", tmp_path / "ranks.png")
    assert size_of_png(tmp_path / "ranks.png")[0] > 800


def test_few_seeds_tell_nothing_apart(tmp_path):
    ours = finished(tmp_path / "results.jsonl", figures(2))
    found = ranked_methods(ours, ours.settings[0], ["auc"])
    assert found.groups == [(0, 3)]
    assert "more than there are places" in ranks_sentence(ours, found)


def test_nothing_to_rank(tmp_path):
    two = finished(tmp_path / "two.jsonl", {"hard_sharing": [0.5] * 5, "a": [0.6] * 5})
    assert ranked_methods(two, two.settings[0], ["auc"]) is None
    one = finished(tmp_path / "one.jsonl", figures(1))
    assert ranked_methods(one, one.settings[0], ["auc"]) is None
    assert ranked_methods(finished(tmp_path / "x.jsonl", figures(3)), one.settings[0], ["f1"]) is None
