"""Trainings that are killed, terminated, or find their checkpoints damaged, in real processes."""

import json
import os
import random
import signal
import sys
import time

import pytest

from recipes.runtime.log import CLOCK_FIELDS

from ..support.small_training import finish, killed, outcome_of, same, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

#: Everything that has a state: relations, a strength that is found, an order of PCGrad, dropout, augmentation, accumulation, clipping, a schedule.
EVERYTHING = {
    "method": "regularizer and feature",
    "strength": "auto",
    "noise": 0.1,
    "dropout": 0.3,
    "samples": 43,
    "epochs": 18,
    "accumulation": 2,
    "clip_norm": 1.0,
    "warmup_steps": 20,
    "decay": "cosine",
    "log_steps": 1,
    "checkpoint_steps": 4,
}
KILLS = 10


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK_FIELDS} for line in lines]


def last_step(folder):
    """Of the log so far; its last line may be half written."""
    try:
        lines = (folder / "log.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:  # not begun, or begun anew
        return 0
    return json.loads(lines[-1])["step"] if lines else 0


def newest_checkpoint(folder):
    return max((int(path.name[-8:]) for path in folder.glob("checkpoint-*")), default=0)


def wait(process, wanted):
    deadline = time.monotonic() + 60
    while not wanted() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.0002)


def writing(folder):
    return folder.exists() and any(name.startswith(".writing-") for name in os.listdir(folder))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Folder of the run that nobody killed, without data workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert finish(start(folder, EVERYTHING)) == 0
    return folder


class TestKill:
    @pytest.mark.parametrize("workers", [1, 3])
    def test_ten_kills_at_random_moments_change_nothing(self, undisturbed, tmp_path, workers):
        options = {**EVERYTHING, "data_workers": workers}
        moments = random.Random(workers)
        steps, in_writes = [], 0
        for number in range(KILLS):
            process = start(tmp_path, options)
            if number % 3 == 1:
                wait(process, lambda: writing(tmp_path))
            else:
                # Counted in steps, so that a quick machine is not at the end before the last kill.
                goal = newest_checkpoint(tmp_path) + moments.randrange(1, 14)
                wait(process, lambda: last_step(tmp_path) >= goal)  # noqa: B023
                time.sleep(moments.uniform(0, 0.01))
            process.kill()
            process.join()
            assert killed(process), f"kill {number} came too late"
            steps.append(last_step(tmp_path))
            in_writes += writing(tmp_path)
        assert len(set(steps)) >= KILLS // 2, steps
        assert in_writes >= 1
        assert finish(start(tmp_path, options)) == 0
        assert same(outcome_of(tmp_path), outcome_of(undisturbed))
        assert log_of(tmp_path) == log_of(undisturbed)
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")], "leftovers"

    def test_log_has_every_step_and_epoch_once(self, undisturbed):
        lines = log_of(undisturbed)
        steps_per_epoch = 9
        total = steps_per_epoch * EVERYTHING["epochs"]
        assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, total + 1))
        assert [line["epoch"] for line in lines if line["event"] == "epoch"] == list(range(1, EVERYTHING["epochs"] + 1))
        assert [line["step"] for line in lines if line["event"] == "epoch"] == list(range(9, total + 1, 9))
        rates = [line["learning_rate"][1] for line in lines if line["event"] == "step"]
        assert max(rates) == pytest.approx(0.03)
        assert rates[-1] < 1e-4


class TestTermination:
    def test_signal_to_the_whole_group_spares_the_data_workers(self, undisturbed, tmp_path):
        """As schedulers of clusters send it: the training saves all the same."""
        options = {**EVERYTHING, "data_workers": 2}
        process = start(tmp_path, options, own_group=True)
        wait(process, lambda: last_step(tmp_path) >= 10)
        os.killpg(process.pid, signal.SIGTERM)
        assert finish(process) == 143
        assert (tmp_path / f"checkpoint-{last_step(tmp_path):08d}").is_dir()
        assert finish(start(tmp_path, options)) == 0
        assert same(outcome_of(tmp_path), outcome_of(undisturbed))

    def test_sigterm_saves_after_the_step_and_says_how_to_go_on(self, undisturbed, tmp_path):
        process = start(tmp_path, EVERYTHING)
        wait(process, lambda: last_step(tmp_path) >= 10)
        os.kill(process.pid, signal.SIGTERM)
        assert finish(process) == 143
        step = last_step(tmp_path)
        assert (tmp_path / f"checkpoint-{step:08d}").is_dir()
        message = (tmp_path / "message").read_text()
        assert f"after step {step}, with a checkpoint" in message
        assert "Use --resume auto" in message
        assert finish(start(tmp_path, EVERYTHING)) == 0
        assert same(outcome_of(tmp_path), outcome_of(undisturbed))
        assert log_of(tmp_path) == log_of(undisturbed)
