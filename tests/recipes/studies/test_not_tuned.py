"""The package's defaults as a method: in every study, without trials, and behind the baseline's weight decay."""

import pytest

from recipes import cifar_grid, digits, go_emotions_grid, synthetic, tabular
from recipes.studies.linear_tasks.methods import METHODS as LINEAR

from ..support.commands import call
from ..support.studies import TINY_DIGITS, lines_of

KEY = "srdml_default"


def test_digits(tmp_path):
    answer = call(digits.main, *TINY_DIGITS, "--workers", "1", "--out", tmp_path, "--methods", KEY)
    assert answer.code == 0, answer.err
    cells = [line["cell"] for line in lines_of(tmp_path / "results.jsonl")]
    trials = [cell for cell in cells if not cell["reported"]]
    assert {cell["method"] for cell in trials} == {"hard_sharing"}
    reported = [cell for cell in cells if cell["reported"]]
    assert [(cell["method"], cell["seed"]) for cell in reported] == [(KEY, 0), (KEY, 1)]
    assert {cell["weight_decay"] for cell in trials} == {0.0}
    assert {cell["weight_decay"] for cell in reported} < {0.0, 1.0}
    assert "SRDML, not tuned" in answer.out


def test_synthetic_has_no_weight_decay(tmp_path):
    few = ("--steps", "20", "--seeds", "1", "--tuning-seeds", "1", "--trials", "1", "--workers", "1")
    answer = call(synthetic.main, *few, "--methods", "single_ridge", KEY, "--out", tmp_path)
    assert answer.code == 0, answer.err
    cells = [line["cell"] for line in lines_of(tmp_path / "results.jsonl")]
    (cell,) = [cell for cell in cells if cell["method"] == KEY]
    assert (cell["value"], cell["reported"]) == (LINEAR[KEY].fixed, True)
    assert "weight_decay" not in cell


@pytest.mark.parametrize("study", [cifar_grid, digits, go_emotions_grid, tabular])
def test_is_not_in_published_tables(study):
    command = study.COMMAND
    options = command._parser().parse_args([])
    for setting in command.settings_of(options).values():
        assert KEY not in setting.methods
        assert setting.has_space(command.methods[KEY])
        assert len(setting.space(command.methods[KEY])) == 1
