"""What a training tells whoever watches it: a bar in a terminal, a line for each epoch elsewhere."""

import contextlib
import io
import json
import math
import os
import re
import struct
import sys

import pytest

from recipes.runtime.tables import duration_text
from tests.support.two_processes import run_on_two_processes

from ..support.small_training import Training, as_rank

WATCHED = {"samples": 11, "epochs": 3, "progress": True}
FIGURES = {"validation_score": 0.81234, "penalty_share": 0.0081}


def seen_in_terminal(monkeypatch, train, columns=100):
    """What is written to a pseudo terminal in the place of standard error, line by line."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w", buffering=1) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        train()
        stream.flush()
        os.set_blocking(ours, False)
        text = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                text += os.read(ours, 1 << 16)
    os.close(ours)
    return text.decode().strip().split("\r")


def told(capsys, **options):
    Training(**{**WATCHED, **options}).run()
    return capsys.readouterr().err


def losses_of(folder, event):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    means = [list(line["loss"].values()) for line in lines if line["event"] == event]
    return [f"{sum(values) / len(values):.4f}" for values in means]


class TestBar:
    def test_shows_loss_score_and_share_of_the_penalty(self, monkeypatch, tmp_path):
        lines = seen_in_terminal(monkeypatch, Training(tmp_path, figures=FIGURES, **WATCHED).run)
        assert lines[-1].startswith("100%|")
        assert "| 9/9 [" in lines[-1]
        assert f"loss {losses_of(tmp_path, 'epoch')[-1]}, score 0.8123, penalty 0.8 %, " in lines[-1]
        assert "epoch" not in " ".join(lines)

    def test_shows_the_loss_of_the_last_interval(self, monkeypatch, tmp_path):
        def train():
            with pytest.raises(KeyboardInterrupt):
                Training(tmp_path, log_steps=4, after_epoch=stop_after(2), **WATCHED).run()

        last = seen_in_terminal(monkeypatch, train)[-1]
        assert "| 6/9 [" in last
        assert f"loss {losses_of(tmp_path, 'step')[0]}, " in last

    def test_fits_into_a_narrow_terminal(self, monkeypatch):
        last = seen_in_terminal(monkeypatch, Training(figures=FIGURES, **WATCHED).run, columns=80)[-1]
        assert len(last) <= 80
        assert "score 0.8123, penalty 0.8 %" in last

    def test_is_not_drawn_unasked(self, monkeypatch):
        assert seen_in_terminal(monkeypatch, Training(**{**WATCHED, "progress": False}).run) == [""]


def stop_after(epoch):
    def stop(training, now):
        if now == epoch:
            raise KeyboardInterrupt

    return stop


class TestLines:
    def test_one_for_each_epoch(self, capsys, tmp_path):
        lines = told(capsys, folder=tmp_path, figures=FIGURES).splitlines()
        assert len(lines) == 3
        for number, (line, loss) in enumerate(zip(lines, losses_of(tmp_path, "epoch")), start=1):
            beginning = f"epoch {number} of 3: loss {loss}, validation score 0.8123, penalty 0.8 % of the losses, "
            assert line.startswith(beginning)
            assert re.fullmatch(r"\d+ s, \d+ s left" if number < 3 else r"\d+ s", line.removeprefix(beginning))

    def test_figures_of_the_recipe(self, capsys):
        line = told(capsys, figures={"training_loss": 0.25, "validation_auc": 0.5}).splitlines()[0]
        assert line.startswith("epoch 1 of 3: loss 0.2500, validation AUC 0.5000, ")

    def test_what_is_not_known_is_left_out(self, capsys):
        figures = {"validation_score": math.nan, "penalty_share": None}
        line = told(capsys, figures=figures).splitlines()[0]
        assert re.fullmatch(r"epoch 1 of 3: loss \d\.\d{4}, \d+ s, \d+ s left", line)

    def test_a_loss_that_is_none_is_told(self, capsys):
        assert "epoch 1 of 3: loss nan, " in told(capsys, figures={"training_loss": math.nan})

    def test_resumed_training_goes_on_counting(self, capsys, tmp_path):
        options = {**WATCHED, "checkpoint_steps": 2}
        with pytest.raises(KeyboardInterrupt):
            Training(tmp_path, after_epoch=stop_after(2), **options).run()
        assert capsys.readouterr().err.startswith("epoch 1 of 3: ")
        Training(tmp_path, **options).run("auto")
        assert [line[:12] for line in capsys.readouterr().err.splitlines()] == ["epoch 2 of 3", "epoch 3 of 3"]

    def test_nothing_unasked(self, capsys):
        assert told(capsys, progress=False) == ""

    def test_only_the_main_process_tells(self):
        one, other = run_on_two_processes(told_on_rank)
        assert one.count("epoch ") == 3
        assert other == ""

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
    def test_full_disk_under_standard_error_does_not_end_the_training(self, monkeypatch):
        stream = open("/dev/full", "w")  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", stream)
        training = Training(**WATCHED)
        training.run()
        assert training.engine.position.epoch == 3
        with pytest.raises(OSError, match="No space"):
            stream.close()


def told_on_rank(rank):
    as_rank(rank)
    before, sys.stderr = sys.stderr, io.StringIO()
    try:
        Training(**WATCHED).run()
        return sys.stderr.getvalue()
    finally:
        sys.stderr = before


def test_durations():
    assert [duration_text(seconds) for seconds in (0.4, 119, 125, 7000, 9000)] == [
        "0 s",
        "119 s",
        "2 min",
        "117 min",
        "2.5 h",
    ]
