"""The first command: the cells of other studies, a page at the end, and words at once."""

import dataclasses

import pytest

from recipes import demo, digits, groups
from recipes.studies.study import Cell

from ..support.commands import call, finish, start
from ..support.studies import lines_of, table_rows

FEW = ("--seeds", "1", "--tuning-seeds", "1", "--workers", "1")


def test_trainings_are_those_of_the_studies():
    options = groups.COMMAND._parser().parse_args([])
    known = groups.COMMAND.settings_of(options)
    for key in ("hsb82-10", "exam-10"):
        ours = demo.SETTINGS[key]
        assert (ours.values, ours.spaces, ours.label) == (known[key].values, known[key].spaces, known[key].label)
        assert ours.decay_of_baseline
    options = digits.COMMAND._parser().parse_args([])
    known = digits.COMMAND.settings_of(options)["digits"]
    ours = demo.SETTINGS["digits"]
    left_out = {"temperature", "accumulation", "mixed_precision", "clip_norm"}
    assert set(known.values) - set(ours.values) == left_out
    assert {name: known.values[name] for name in ours.values} == ours.values
    assert ours.spaces == {"hard_sharing": known.spaces["weight decay"]}
    for setting in demo.SETTINGS.values():
        assert all(setting.has_space(demo.METHODS[key]) for key in setting.methods)
        assert setting.methods[-1] == "srdml_default"


def test_digits_have_hard_sharing_alone(tmp_path):
    for key in ("pooled", "single_task", "constant", "srdml"):
        assert not demo.SETTINGS["digits"].has_space(demo.METHODS[key])
    answer = call(demo.main, "--methods", "hard_sharing", "pooled", "--settings", "digits", "--out", tmp_path)
    assert answer.code == 2
    assert "digits has no values to try for the weight decay of pooled" in answer.complaint


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and answer of a run in a child, as users have it."""
    out = tmp_path_factory.mktemp("demo")
    process = start("recipes.demo", "--settings", "exam-10", *FEW, "--out", out)
    first = process.stdout.readline()
    return out, first, finish(process, 300)


def test_says_something_first(finished):
    assert finished[1].startswith("Two tables of schools")
    assert "1 of 15 trainings" in finished[2].err


def test_table_verdict_and_page(finished):
    out, _, answer = finished
    assert answer.code == 0, answer.err
    assert len(lines_of(out / "results.jsonl")) == 15
    rows = table_rows(answer.out)
    assert rows[0] == ["method", "tuned", "seeds", "nMSE (lower is better)", "difference in nMSE"], (
        "no column for digits"
    )
    assert [row[0] for row in rows[2:]] == ["Hard sharing", "One head, intercept per group", "SRDML, not tuned"]
    assert (
        "Too few seeds. London schools, examination, 10 rows of each group: SRDML (not tuned) against tuned hard"
        in answer.out
    )
    last = answer.out.rstrip().splitlines()[-1]
    assert last == f"Open this page in a browser: {(out / 'report.html').as_uri()}"
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "exam-10 shrinkage" in text
    assert "python -m recipes.demo --settings exam-10" in text


@pytest.mark.parametrize(("key", "metric"), [("digits", "auc"), ("hsb82-10", "nmse")])
def test_each_cell_goes_to_the_study_that_it_is_from(key, metric, tmp_path):
    setting = demo.SETTINGS[key]
    setting = dataclasses.replace(setting, values={**setting.values, "epochs": 1, "evaluations": 1})
    outcome = demo.train_demo(Cell(setting, demo.METHODS["hard_sharing"], 1.0, 0, reported=True), None, tmp_path)
    assert metric in outcome.to_dict()["macro"]
