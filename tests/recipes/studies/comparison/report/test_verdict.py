"""Whether anything beats the baseline, in a sentence."""

import pytest

from recipes.studies.comparison.report.intervals import adjusted_interval
from recipes.studies.comparison.report.verdict import NO, YES, comparison_verdict, comparison_verdicts
from recipes.studies.verdicts import FEW, UNKNOWN

from ....support.many_methods import finished

BASE = [0.80, 0.82, 0.79, 0.81, 0.83]


def above(change, noise=0.001):
    """Better than the baseline in each seed by about this."""
    return [own + change + noise * sign for own, sign in zip(BASE, (1, -1, 2, -2, 0))]


def said(tmp_path, figures, metric="auc"):
    ours = finished(tmp_path / "results.jsonl", {"hard_sharing": BASE, **figures}, metric)
    return comparison_verdict(ours, ours.settings[0], metric)


def test_yes(tmp_path):
    verdict = said(tmp_path, {"a": above(0.02), "b": above(0.03), "c": above(0.001, 0.01), "d": above(-0.02)})
    assert verdict.kind == YES
    assert str(verdict) == (
        "Yes. Setting one: 2 of 4 methods beat tuned hard sharing in AUC: Method b by 3.00 points (adjusted 95 % interval "
        "2.69 to 3.31); Method a by 2.00 points (adjusted 95 % interval 1.69 to 2.31). Clearly worse: Method d by 2 points."
    )


def test_the_best_of_many_by_chance_is_none(tmp_path):
    """Clear of 0 alone, and not as the best of 30."""
    lucky = above(0.002, 0.001)
    assert said(tmp_path, {"lucky": lucky}).kind == YES
    verdict = said(tmp_path / "x", {"lucky": lucky, **{f"m{index}": above(-0.001, 0.002) for index in range(29)}})
    assert verdict.kind == NO
    assert (
        "nothing here beats tuned hard sharing in AUC clearly; the best of 30 methods is Method lucky: +0.20 points"
        in (verdict.sentence)
    )


def test_no_says_what_could_have_been_seen(tmp_path):
    figures = {"a": above(0.0, 0.01), "b": above(0.0, 0.02), "c": above(0.0, 0.03)}
    ours = finished(tmp_path / "results.jsonl", {"hard_sharing": BASE, **figures})
    setting = ours.settings[0]
    low, high = adjusted_interval(ours, setting, ours.methods["b"], "auc")
    verdict = comparison_verdict(ours, setting, "auc")
    assert (
        f"Half of the methods would have to differ by more than {100 * (high - low) / 2:.2g} points" in verdict.sentence
    )


def test_lower_errors_beat(tmp_path):
    verdict = said(tmp_path, {"a": above(-0.02), "b": above(0.02)}, "nmse")
    assert verdict.kind == YES
    assert "1 of 2 methods beats tuned hard sharing in nMSE: Method a by 2.5 % (adjusted" in verdict.sentence
    assert verdict.sentence.endswith("Clearly worse: Method b by 2.5 %.")


def test_hard_sharing_that_learned_nothing(tmp_path):
    verdict = said(tmp_path, {"a": above(0.02), "constant": above(0.0, 0.01)})
    assert "1 of 1 method beats" in verdict.sentence
    assert (
        "Tuned hard sharing itself is not clearly better than the trivial model (Method constant; difference in AUC "
        in (verdict.sentence)
    )
    better = said(tmp_path / "better", {"a": above(0.02), "constant": [0.5] * 5})
    assert "trivial" not in better.sentence
    error = said(tmp_path / "error", {"a": above(0.02), "constant": [0.5] * 5}, "nmse")
    assert "not clearly better than the trivial model" in error.sentence


def test_the_trivial_model_is_no_answer(tmp_path):
    verdict = said(tmp_path, {"a": above(0.0, 0.01), "constant": above(0.05)})
    assert verdict.kind == NO
    assert "the best of 1 method is Method a" in verdict.sentence


def test_what_is_not_there(tmp_path):
    verdict = said(tmp_path, {"a": above(0.02), "broken": [0.9, None, 0.9, 0.9, 0.9]})
    assert verdict.sentence.endswith("No figure in some seed: Method broken.")
    ours = finished(tmp_path / "late.jsonl", {"hard_sharing": BASE, "a": above(0.02), "late": []})
    (late,) = comparison_verdicts(ours, ["nmse", "auc"])
    assert late.sentence.endswith("Not done: Method late.")
    few = said(tmp_path / "few", {"a": above(0.02)[:2]})
    assert few.kind == FEW
    assert "3 seeds are needed" in few.sentence
    assert said(tmp_path / "none", {"late": []}).kind == UNKNOWN
    alone = finished(tmp_path / "alone.jsonl", {"hard_sharing": BASE})
    assert comparison_verdicts(alone, ["auc"]) == []


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in ("x", "better", "error", "few", "none"):
        (tmp_path / name).mkdir()
