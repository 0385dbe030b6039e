"""Kinds of arguments, and errors of command lines."""

import argparse
import sys

import pytest

from recipes import digits
from recipes.methods.methods import METHODS
from recipes.runs import command_line
from recipes.runs.command_line import NON_NEGATIVE, POSITIVE, folder_name, method_name, whole_number


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message"),
    [
        (whole_number(1), {"1": 1, "12": 12}, ("0", "-1", "two", "1.5", "", "1e3"), "Pass a whole number from 1 on"),
        (whole_number(0), {"0": 0}, ("-1",), "Pass a whole number from 0 on, such as 2"),
        (POSITIVE, {"0.5": 0.5, "1e-3": 1e-3}, ("0", "-1", "nan", "inf", "x", ""), "Pass a finite number above 0"),
        (NON_NEGATIVE, {"0": 0.0, "2": 2.0}, ("-1", "nan", "-inf", "x"), "Pass a finite number from 0 on"),
        (folder_name, {"one": "one"}, ("a/b", "..", ".", "", "a\\b", "/"), "Pass a plain folder name"),
        (
            method_name,
            {"srdml": "srdml", "srdml_entropic": "srdml", "pcgrad_feature": "pcgrad"},
            ("SRDML", "mine"),
            f"Use one of {', '.join(METHODS)}",
        ),
    ],
    ids=["count", "from zero", "positive", "from zero on", "folder", "method"],
)
def test_kinds_of_arguments(kind, good, bad, message):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError) as found:
            kind(text)
        assert str(found.value).startswith(f"found {text!r}. ")
        assert message in str(found.value)


@pytest.mark.parametrize(("tracker", "package"), [("wandb", "wandb"), ("comet_ml", "comet-ml")])
def test_tracker_that_is_not_installed(tracker, package, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(SystemExit) as stop:
        digits.main(["--out", str(tmp_path), "--trackers", tracker])
    assert stop.value.code == 2
    complaints = " ".join(capsys.readouterr().err.split())
    assert f"{tracker} needs the package {package}" in complaints
    assert complaints.endswith(f"Run: pip install {package}")
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_complains(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "SECONDS_OF_SILENCE", 0.0)
    monkeypatch.setenv("RANK", "1")
    for option, code in (("--epochs=0", 2), ("--help", 0)):
        with pytest.raises(SystemExit) as stop:
            digits.main([option])
        assert stop.value.code == code
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        digits.main(["--epochs=0"])
    assert "Pass a whole number" in capsys.readouterr().err
