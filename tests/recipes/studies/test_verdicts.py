"""What a study says in a sentence."""

import math
import statistics

import pytest

from recipes.methods.methods import METHODS
from recipes.studies.verdicts import FEW, HELPS, HURTS, UNCLEAR, UNKNOWN, Effect, effect_of, our_method, verdicts

from ..support.small_study import BASE, OURS, Trained, in_turn, setting, study


def finished(path, ours, base=(0.5, 0.6, 0.7, 0.55, 0.65), metric="nmse", methods=("hard_sharing", "srdml")):
    """A study in which each seed has these test figures."""

    def train(cell):
        values = base if cell.method is BASE else ours
        return {"validation": 0.5, "macro": {metric: values[cell.seed]} if cell.reported else {}}

    found = study(path, setting(methods=methods), seeds=len(base))
    list(found.run(in_turn, Trained(train)))
    return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


@pytest.mark.parametrize(
    ("metric", "change", "kind"),
    [
        ("nmse", (-0.03, -0.04, -0.05, -0.03, -0.04), HELPS),
        ("nmse", (0.03, 0.04, 0.05, 0.03, 0.04), HURTS),
        ("nmse", (0.03, -0.04, 0.05, -0.03, 0.0), UNCLEAR),
        ("auc", (0.03, 0.04, 0.05, 0.03, 0.04), HELPS),
        ("auc", (-0.03, -0.04, -0.05, -0.03, -0.04), HURTS),
        ("auc", (0.0, 0.0, 0.0, 0.0, 0.0), UNCLEAR),
        ("error_inside", (-0.03, -0.04, -0.05, -0.03, -0.04), HELPS),
    ],
)
def test_the_interval_decides_and_errors_are_better_when_lower(path, metric, change, kind):
    base = (0.5, 0.6, 0.7, 0.55, 0.65)
    ours = finished(path, [own + more for own, more in zip(base, change)], base, metric)
    assert [verdict.kind for verdict in verdicts(ours, [metric])] == [kind]


def test_an_error_is_in_per_cent_of_the_baseline_and_a_share_in_points(path):
    base, change = (0.5, 0.6, 0.7, 0.55, 0.65), (-0.03, -0.04, 0.01, -0.03, -0.06)
    for metric, scale in (("nmse", 100 / statistics.fmean(base)), ("auc", 100)):
        own = path.with_name(f"{metric}.jsonl")
        ours = finished(own, [own + more for own, more in zip(base, change)], base, metric)
        (one,) = ours.settings
        known = ours.difference(one, OURS, [metric])[metric]
        effect = effect_of(ours, one, OURS, metric)
        assert (effect.mean, effect.low, effect.high) == pytest.approx(
            [scale * value for value in (known.mean, known.low, known.high)]
        )
        assert effect.mean == pytest.approx(scale * statistics.fmean(change))
        assert (effect.wins, effect.seeds) == (4 if metric == "nmse" else 1, 5)


def test_sentences(path):
    base = (0.5,) * 5
    (said,) = verdicts(finished(path, (0.45, 0.4, 0.45, 0.4, 0.45), base), ["nmse"])
    assert said.sentence == (
        "Setting one: SRDML is 14.0 % below tuned hard sharing in nMSE (95 % interval 10.0 to 18.0 %), lower in 5 of 5 seeds."
    )
    assert str(said) == f"Helps. {said.sentence}"
    few = finished(path.with_name("few.jsonl"), (0.45, 0.6), (0.5, 0.5), "auc")
    (said,) = verdicts(few, ["auc"])
    assert said.kind == FEW
    assert said.sentence == (
        "Setting one: SRDML against tuned hard sharing in AUC: +2.50 points, 95 % interval -5.00 to +10.00 points, "
        "higher in 1 of 2 seeds."
    )
    (said,) = verdicts(finished(path.with_name("one.jsonl"), (0.45,), (0.5,)), ["nmse"])
    assert said.sentence.endswith("in nMSE: -10.0 %, lower in 1 of 1 seed.")


def test_what_is_not_there_is_no_verdict(path):
    nothing = study(path)
    (said,) = verdicts(nothing, ["nmse"])
    assert said.kind == UNKNOWN
    diverged = finished(path, (0.4, None, 0.4, 0.4, 0.4))
    (said,) = verdicts(diverged, ["nmse"])
    assert said.kind == UNKNOWN
    assert verdicts(diverged, []) == []
    assert verdicts(study(path, setting(methods=("srdml",))), ["nmse"]) == []
    assert verdicts(study(path, setting(methods=("hard_sharing", "pcgrad"))), ["nmse"]) == []


def test_the_first_metric_that_a_setting_has(path):
    ours = finished(path, (0.4,) * 5)
    assert "in nMSE" in verdicts(ours, ["auc", "nmse"])[0].sentence


def test_the_method_is_chosen_by_name(path):
    chosen = {
        ("hard_sharing", "srdml_uniform", "srdml_cosine", "srdml", "srdml_default"): "srdml_default",
        ("hard_sharing", "srdml_cosine", "srdml"): "srdml",
        ("hard_sharing", "srdml_uniform", "srdml_cosine", "srdml_projected"): "srdml_cosine",
    }
    for methods, key in chosen.items():
        ours = study(path, setting(methods=methods))
        assert our_method(ours, ours.settings[0]) is METHODS[key]


def test_no_interval_is_no_verdict():
    assert Effect("nmse", -1.0, math.nan, math.nan, 9, 9).kind == FEW
