"""Lines about how far a study is."""

import io
import sys

import pytest

from recipes.studies import progress
from recipes.studies.progress import told

from ..support.small_study import Trained, in_turn, plain, study


class Clock:
    """Goes on by so many seconds with each training."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.mark.parametrize(
    ("seconds", "lines"), [(0.0, [1, 14]), (5.0, [1, 3, 5, 7, 9, 11, 13, 14]), (600.0, range(1, 15))]
)
def test_lines_come_now_and_then_with_the_first_and_the_last(tmp_path, capsys, monkeypatch, seconds, lines):
    clock = Clock(seconds)
    monkeypatch.setattr(progress, "time", clock)
    ours = study(tmp_path / "results.jsonl")
    with told(ours, speaks=True) as tell:
        for cell, result in ours.run(in_turn, Trained(plain)):
            clock.now += seconds
            tell(cell, result)
    found = capsys.readouterr()
    assert found.out == ""
    said = found.err.splitlines()
    assert [int(line.split()[0]) for line in said] == list(lines)
    assert said[0].startswith("1 of 14 trainings (one, hard_sharing, seed 1000: validation score 0.5000), ")
    expected = {0.0: "0 s", 5.0: "65 s", 600.0: "2.2 h"}
    assert said[0].endswith(f"), {expected[seconds]} left")
    assert said[-1].endswith(", 0 s left")


def test_of_what_is_left_when_it_goes_on(tmp_path, capsys, monkeypatch):
    """Trainings of an earlier run count as done, and not for the speed."""
    path = tmp_path / "results.jsonl"
    list(study(path).run(in_turn, Trained(plain, until=9)))
    clock = Clock(60.0)
    monkeypatch.setattr(progress, "time", clock)
    ours = study(path)
    with told(ours, speaks=True) as tell:
        for cell, result in ours.run(in_turn, Trained(plain)):
            clock.now += 60
            tell(cell, result)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("10 of 14 trainings (one, srdml, seed 0: ")
    assert first.endswith("), 4 min left")


def test_training_without_a_score_and_processes_that_are_silent(tmp_path, capsys):
    ours = study(tmp_path / "results.jsonl")
    (cell, _), *_ = list(ours.run(in_turn, Trained(plain)))
    with told(ours, speaks=True) as tell:
        tell(cell, {"validation": None})
    assert ": no score)" in capsys.readouterr().err
    with told(ours, speaks=False) as tell:
        tell(cell, {"validation": 0.5})
    assert capsys.readouterr() == ("", "")


def test_bar_in_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    ours = study(tmp_path / "results.jsonl")
    with told(ours, speaks=True) as tell:
        for cell, result in ours.run(in_turn, Trained(plain)):
            tell(cell, result)
    assert "14/14" in sys.stderr.getvalue()
    assert "trainings (" not in sys.stderr.getvalue()
