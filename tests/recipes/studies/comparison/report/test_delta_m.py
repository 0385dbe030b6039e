"""Gains over single-task, and costs."""

import math

import numpy
import pytest

from recipes.studies.comparison.report.costs import Costs, costs_of, count_text, memory_text, step_text
from recipes.studies.comparison.report.delta_m import delta_m, delta_m_of, mean_and_std

from ....support.many_methods import finished

SINGLE = {"a": {"auc": 0.8, "accuracy": 0.9}, "b": {"auc": 0.5, "accuracy": 0.5}, "c": {"nmse": 0.4}}
OURS = {"a": {"auc": 0.9, "accuracy": 0.1}, "b": {"auc": 0.45, "accuracy": 0.5}, "c": {"nmse": 0.3}}


def test_by_hand():
    # 1/8 up, 1/10 down, and a quarter of the error less.
    assert delta_m(OURS, SINGLE, ["auc", "accuracy", "nmse"]) == pytest.approx((12.5 - 10 + 25) / 3)
    assert delta_m(SINGLE, SINGLE, ["auc", "nmse"]) == 0


def test_many_tasks_against_numpy():
    single, ours = numpy.random.default_rng(0).uniform(0.1, 1, (2, 40))
    sign = numpy.where(numpy.arange(40) % 2, -1, 1)
    names = [("auc", "nmse")[task % 2] for task in range(40)]
    scores = [{f"{task}": {names[task]: value} for task, value in enumerate(own)} for own in (ours, single)]
    found = delta_m(scores[0], scores[1], ["auc", "nmse"])
    assert found == pytest.approx(float((100 * sign * (ours - single) / single).mean()), rel=1e-12)


def test_what_cannot_be_compared():
    unknown = {**SINGLE, "b": {"auc": None}}
    assert delta_m(OURS, unknown, ["auc", "nmse"]) == pytest.approx((12.5 + 25) / 2)
    assert math.isnan(delta_m({**OURS, "a": {"auc": None}}, SINGLE, ["auc", "nmse"])), "diverged: no mean of the rest"
    assert math.isnan(delta_m(OURS, SINGLE, ["f1"]))
    assert math.isnan(delta_m(OURS, {}, ["auc"]))
    assert mean_and_std([1.0, math.nan]) == pytest.approx((math.nan, math.nan), nan_ok=True)
    assert mean_and_std([1.0, 3.0]) == pytest.approx((2.0, math.sqrt(2)))


def test_within_a_seed(tmp_path):
    scores = {
        "single_task": [{"a": {"auc": 0.5}}, {"a": {"auc": 0.8}}],
        "hard_sharing": [{"a": {"auc": 0.6}}, {"a": {"auc": 0.4}}],
    }
    figures = {"single_task": [0.5, 0.8], "hard_sharing": [0.6, 0.4]}
    ours = finished(tmp_path / "results.jsonl", figures, scores=scores)
    (one,) = ours.settings
    assert delta_m_of(ours, one, ours.methods["hard_sharing"], ["auc"]) == pytest.approx({0: 20.0, 1: -50.0})
    assert delta_m_of(ours, one, ours.methods["single_task"], ["auc"]) == {}


def test_costs_are_relative_within_a_seed(tmp_path):
    costs = {
        "hard_sharing": [{"parameters": 10, "seconds_per_step": 1.0, "peak_memory": None}]
        + [{"parameters": 10, "seconds_per_step": own} for own in (2.0, 4.0)],
        # On a slower machine both are slower.
        "a": [{"parameters": 20, "seconds_per_step": own, "peak_memory": 5} for own in (2.0, 3.0, 12.0)],
    }
    ours = finished(tmp_path / "results.jsonl", {key: [0.5] * 3 for key in ("hard_sharing", "a", "none")}, costs=costs)
    (one,) = ours.settings
    assert costs_of(ours, one, ours.methods["a"]) == Costs(20, 2.0, 5)
    assert costs_of(ours, one, ours.methods["hard_sharing"]) == Costs(10, 1.0, None)
    assert costs_of(ours, one, ours.methods["none"]) == Costs()


@pytest.mark.parametrize(
    ("text", "known"),
    [
        (count_text(None), "-"),
        (count_text(950), "950"),
        (count_text(12345), "12.3 k"),
        (count_text(4_560_000), "4.56 M"),
        (count_text(138_000_000), "138 M"),
        (memory_text(None), "-"),
        (memory_text(3 * 2**20), "3.00 MiB"),
        (memory_text(1.5 * 2**30), "1.50 GiB"),
        (step_text(None), "-"),
        (step_text(1.234), "1.23"),
    ],
)
def test_texts(text, known):
    assert text == known
