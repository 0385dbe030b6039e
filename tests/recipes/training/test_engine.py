"""The training loop of the recipes: the same steps in every division of the work, and checkpoints that can be trusted."""

import importlib
import json
import math
import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from recipes.runtime.errors import CheckpointError, CheckpointMismatchError, OptionError
from recipes.runtime.log import RunLog
from recipes.runtime.random_state import kept_random_state, random_state
from recipes.runtime.termination import Terminated, deferred, listening
from recipes.training.checkpoints import Checkpoints, check, load
from tests.support.two_processes import run_on_two_processes

from ..support.small_training import METHODS, Samples, Training, as_rank, finish, outcome_of, same, start

#: Batches of 5, 5 and 1 of 11 samples: with two processes one of them has none in the last step.
UNEVEN = {"samples": 11, "epochs": 3, "batch_size": 5}
TOLERANCE = 1e-10


def assert_close(one, other):
    for name, value in one["model"].items():
        assert (value - other["model"][name]).abs().max() < TOLERANCE, name
    if one["relations"] is not None:
        assert torch.tensor(one["relations"]).sub(torch.tensor(other["relations"])).abs().max() < TOLERANCE
    assert one["best"]["epochs"] == other["best"]["epochs"]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def train_on_rank(rank, folder, resume, options):
    as_rank(rank)
    return Training(None if folder is None else Path(folder), **options).run(resume)


def train_on_two(options, folder=None, resume="never"):
    one, other = run_on_two_processes(train_on_rank, None if folder is None else str(folder), resume, options)
    assert same(one["model"], other["model"]), "the processes have different weights"
    assert same(one["best"], other["best"])
    return one


def in_two_stages():
    first = Training(method="plain", **UNEVEN)
    first.run()
    second = Training(method="regularizer", model=first.model, **UNEVEN)
    return second.run()


def stages_on_rank(rank):
    as_rank(rank)
    return in_two_stages()


class TestSteps:
    @pytest.mark.parametrize("method", ["plain", "regularizer", "parameters", "regularizer and parameters"])
    def test_micro_batches_make_the_same_step(self, method):
        whole = Training(method=method, clip_norm=0.5, **UNEVEN).run()
        split = Training(method=method, clip_norm=0.5, accumulation=2, **UNEVEN).run()
        assert_close(whole, split)
        other = Training(method=method, clip_norm=0.5, seed=1, **UNEVEN).run()
        assert not same(whole["model"], other["model"])

    @pytest.mark.parametrize("method", METHODS)
    def test_two_processes_make_the_same_step(self, method):
        options = {"method": method, "clip_norm": 0.5, **UNEVEN}
        assert_close(Training(**options).run(), train_on_two(options))

    def test_two_processes_with_micro_batches_make_the_same_step(self):
        for method in ("regularizer", "regularizer and parameters"):
            options = {"method": method, **UNEVEN}
            assert_close(Training(**options).run(), train_on_two({"accumulation": 2, **options}))

    def test_loss_is_the_mean_over_the_labels_of_the_whole_step(self):
        training = Training(method="plain", batch_size=12, epochs=1)
        data = training.engine.source
        with torch.no_grad():
            outputs = torch.stack(list(training.model(data.inputs).values()), 1)
        errors = (outputs - data.labels).square() * data.known
        expected = (errors.sum(0) / data.known.sum(0)).tolist()
        seen = []
        training.engine.run(lambda epoch, losses: seen.append(losses) or {})
        assert seen == [pytest.approx(expected)]

    def test_task_without_any_label_changes_nothing_but_its_decay(self):
        training = Training(method="plain", epochs=1)  # a penalty needs no labels, and would train that head, too
        training.engine.source.known[:, 1] = False
        before = {name: value.clone() for name, value in training.model.state_dict().items()}
        seen = []
        training.engine.run(lambda epoch, losses: seen.extend(losses) or {})
        assert math.isnan(seen[1])
        assert math.isfinite(seen[0])
        decay = (1 - 0.03 * 0.01) ** 3  # of AdamW, in three steps
        for name, value in training.model.state_dict().items():
            only_decayed = torch.allclose(value, before[name] * decay, rtol=1e-12, atol=0)
            assert only_decayed == name.startswith("heads.b."), name

    @pytest.mark.parametrize("method", METHODS)
    def test_loss_scale_changes_nothing(self, method):
        """A power of two is exact."""
        plain = Training(method=method, **UNEVEN).run()
        assert same(Training(method=method, scale=1024.0, **UNEVEN).run(), plain)

    def test_gradients_that_others_left_do_not_count(self):
        expected = Training(**UNEVEN).run()
        training = Training(**UNEVEN)
        for parameter in training.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        assert same(training.run(), expected)

    def test_step_that_overflows_is_skipped_by_everything(self):
        training = Training(samples=5, epochs=2, scale=1024.0, decay="linear")
        training.engine.source.labels[0] = math.inf
        training.engine.source.known[0] = True
        before = training.outcome()
        training.run()
        assert same(before["model"], training.outcome()["model"])
        assert before["relations"] == training.outcome()["relations"]
        assert training.engine._scheduler.get_last_lr() == [0.01, 0.03], "no step was taken"
        assert training.engine.accelerator.scaler.get_scale() == 256.0

    def test_two_stages_train_one_model(self):
        """A second engine on the model of a first one, as after pretraining."""
        alone = in_two_stages()
        assert_close(alone, run_on_two_processes(stages_on_rank)[1])

    def test_global_random_state_is_left_alone(self):
        training = Training(dropout=0.5, noise=0.1)  # building the model seeds PyTorch
        before = random_state()
        training.run()
        with kept_random_state():
            np.random.rand()  # noqa: NPY002
            torch.rand(1)
        assert same(before, random_state())


def ids_on_rank(rank, count):
    as_rank(rank)
    training = Training(method="plain")
    return training.engine.evaluate(Samples(count))


class TestEvaluation:
    @pytest.mark.parametrize("count", [1, 7, 8])
    def test_every_sample_counts_once_and_in_order(self, count):
        alone = Training(method="plain").engine.evaluate(Samples(count))
        assert alone["id"].tolist() == list(range(count))
        for found in run_on_two_processes(ids_on_rank, count):
            assert found["id"].tolist() == list(range(count))
            assert (found["outputs"] - alone["outputs"]).abs().max() < TOLERANCE
            assert torch.equal(found["known"], alone["known"])


SAVING = {"epochs": 4, "samples": 20, "checkpoint_steps": 2, "log_steps": 1, "keep_checkpoints": 3, "noise": 0.1}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folder with checkpoints of a training that ended after two of four epochs, and the outcome of all four."""
    folder = tmp_path_factory.mktemp("stopped")

    def stop(training, epoch):
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Training(folder, after_epoch=stop, **SAVING).run()
    return folder, Training(**SAVING).run()


@pytest.fixture
def copied(stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "run")
    return tmp_path / "run"


class TestCheckpoints:
    def test_are_kept_as_many_as_wanted_and_are_whole(self, stopped):
        names = sorted(path.name for path in stopped[0].glob("checkpoint-*"))
        assert names == ["checkpoint-00000006", "checkpoint-00000008", "checkpoint-00000010"]
        manifest = check(stopped[0] / names[-1])
        assert manifest["step"] == 10
        assert set(manifest["files"]) == {"model.pt", "training.pt", "others.pt", "processes.pt"}

    def test_resumed_training_is_the_same_to_the_bit(self, stopped, copied):
        assert same(Training(copied, **SAVING).run("auto"), stopped[1])

    def test_one_can_be_chosen(self, stopped, copied):
        older = copied / "checkpoint-00000006"
        with pytest.raises(OptionError, match="later checkpoints than checkpoint-00000006.*checkpoint-00000010"):
            Training(copied, **SAVING).run(older)
        for name in ("checkpoint-00000008", "checkpoint-00000010"):
            shutil.rmtree(copied / name)
        assert same(Training(copied, **SAVING).run(older), stopped[1])

    @pytest.mark.parametrize("file", ["model.pt", "training.pt", "others.pt", "processes.pt", "manifest.json"])
    @pytest.mark.parametrize("damage", ["truncated", "missing", "changed"])
    def test_damaged_one_is_left_for_the_one_before(self, stopped, copied, file, damage):
        path = copied / "checkpoint-00000010" / file
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        elif file == "manifest.json":
            path.write_bytes(content.replace(b'"sha256": "', b'"sha256": "0'))
        else:
            path.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
        if (damage, file) == ("changed", "manifest.json"):
            file = "model.pt"  # which no longer fits
        with pytest.warns(UserWarning, match=f"checkpoint-00000010/{file}.*older checkpoint"):
            outcome = Training(copied, **SAVING).run("auto")
        assert same(outcome, stopped[1])
        said = [line for line in lines_of(copied) if line["event"] == "warning"]
        assert len(said) == 1
        assert f"checkpoint-00000010/{file}" in said[0]["message"]
        # For whoever wants to know what happened to it.
        assert [path.name for path in copied.glob(".*")] == [".unusable-checkpoint-00000010"]

    def test_without_any_whole_one_it_starts_anew(self, stopped, copied):
        for path in copied.glob("checkpoint-*/model.pt"):
            path.write_bytes(b"")
        with (
            pytest.warns(UserWarning, match=r"model\.pt is truncated"),
            pytest.warns(UserWarning, match="the training starts from the beginning"),
        ):
            assert same(Training(copied, **SAVING).run("auto"), stopped[1])
        assert [line["step"] for line in lines_of(copied) if line["event"] == "step"] == list(range(1, 17))

    def test_leftovers_of_killed_writes_are_removed(self, stopped, copied):
        leftover = copied / ".writing-checkpoint-00000012-1"
        shutil.copytree(copied / "checkpoint-00000010", leftover)
        (leftover / "manifest.json").unlink()
        assert same(Training(copied, **SAVING).run("auto"), stopped[1])
        assert not leftover.exists()

    def test_kill_between_the_two_renames_is_undone(self, stopped, copied):
        """One of the same step was moved away, and the new one was not yet in its place."""
        newest = Checkpoints(copied).all()[-1]
        newest.rename(newest.with_name(f".replaced-{newest.name}"))
        shutil.copytree(Checkpoints(copied).all()[-1], copied / f".writing-{newest.name}-1")
        Checkpoints(copied).clean()
        assert Checkpoints(copied).all()[-1] == newest
        assert not list(copied.glob(".*"))

    def test_what_cannot_be_read_again_is_told_at_once(self, tmp_path):
        class Measured:
            def state_dict(self):
                return {"best": [np.float64(0.5)]}

            def load_state_dict(self, state):
                pass

        training = Training(tmp_path, **SAVING)
        training.engine._saved.others["measured"] = Measured()
        with pytest.raises(CheckpointError, match="others.pt cannot be loaded"):
            training.run()

    def test_one_of_the_same_step_is_replaced(self, tmp_path):
        for content in ("old", "new"):
            path = Checkpoints(tmp_path).save(3, {"part": content}, {})
        assert load(path, "part") == "new"
        assert check(path)["step"] == 3
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-00000003"]

    def test_existing_ones_are_not_overwritten_unasked(self, copied):
        with pytest.raises(OptionError, match="has checkpoints, the newest of step 10. Use --resume auto"):
            Training(copied, **SAVING).run()

    def test_other_tasks_are_an_error(self, copied):
        with pytest.raises(CheckpointMismatchError, match=r"saved with tasks \['a', 'b', 'c'\]"):
            Training(copied, **SAVING, tasks=("a", "b", "d")).run("auto")

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (
                {"method": "parameters"},
                "saved with .*regularizer.* attached.*Choose the same method, or another folder",
            ),
            ({"width": 9}, "another model or optimizer"),
            ({"batch_size": 4}, "saved with batch_size 5, but here it is 4"),
            ({"seed": 4}, "saved with seed 0, but here it is 4"),
            ({"samples": 19}, "saved with samples 20, but here it is 19"),
            ({"clip_norm": 0.5}, "saved with clip_norm .*, but here it is 0.5"),
            ({"decay": "linear"}, "saved with decay .*, but here it is linear"),
        ],
    )
    def test_other_trainings_are_an_error(self, copied, changed, message):
        with pytest.raises(CheckpointMismatchError, match=message):
            Training(copied, **{**SAVING, **changed}).run("auto")

    def test_no_code_in_them_is_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "broken into"),)

        path = Checkpoints(tmp_path).save(1, {"model": {"a": Evil()}}, {})
        check(path)
        with pytest.raises(CheckpointError, match=r"model\.pt cannot be loaded"):
            load(path, "model")
        assert not (tmp_path / "broken into").exists()

    def test_path_that_is_none(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
            Training(tmp_path, **SAVING).run(tmp_path / "checkpoint-00000001")
        with pytest.raises(OptionError, match="without a folder"):
            Training(**SAVING).run(tmp_path)


def hold_two_epochs(training, epoch):
    if epoch == 3:
        raise KeyboardInterrupt


def stop_on_rank(rank, folder, options):
    as_rank(rank)
    with pytest.raises(KeyboardInterrupt):
        Training(Path(folder), after_epoch=hold_two_epochs, **options).run()


def failed_on_rank(rank, folder, state):
    as_rank(rank)
    training = Training(Path(folder), **SAVING)
    training.engine._saved.others["failing"] = FailingState(state)
    try:
        training.run()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


class FailingState:
    def __init__(self, kind):
        self.kind = kind

    def state_dict(self):
        return {"value": np.float64(0.5) if self.kind == "unreadable" else (lambda: 0)}

    def load_state_dict(self, state):
        pass


class TestErrorsOfTheMainProcess:
    def test_existing_checkpoints(self, copied):
        answers = run_on_two_processes(failed_on_rank, str(copied), "unreadable")
        assert answers[0] == answers[1]
        assert answers[0][0] == "OptionError"
        assert "has checkpoints, the newest of step 10" in answers[0][1]

    def test_checkpoint_that_cannot_be_read_again(self, tmp_path):
        answers = run_on_two_processes(failed_on_rank, str(tmp_path), "unreadable")
        assert answers[0] == answers[1]
        assert answers[0][0] == "CheckpointError"
        assert "others.pt cannot be loaded" in answers[0][1]

    def test_checkpoint_that_cannot_be_written(self, tmp_path):
        own, other = run_on_two_processes(failed_on_rank, str(tmp_path), "unwritable")
        assert other == ("RecipeError", f"the main process could not write a checkpoint ({own[0]}: {own[1]}).")
        assert "lambda" in own[1]
        assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


class TestOtherNumberOfProcesses:
    OPTIONS: ClassVar = {
        "epochs": 4,
        "samples": 11,
        "checkpoint_steps": 4,
        "log_steps": 3,
        "method": "regularizer and feature",
    }

    def test_one_goes_on_where_two_stopped(self, tmp_path):
        run_on_two_processes(stop_on_rank, str(tmp_path), self.OPTIONS)
        assert check(tmp_path / "checkpoint-00000008")["processes"] == 2
        assert_close(Training(tmp_path, **self.OPTIONS).run("auto"), Training(**self.OPTIONS).run())
        self.assert_same_log(tmp_path)

    def test_two_go_on_where_one_stopped(self, tmp_path):
        stop_on_rank_alone(tmp_path, self.OPTIONS)
        assert check(tmp_path / "checkpoint-00000008")["processes"] == 1
        assert_close(train_on_two(self.OPTIONS, tmp_path, "auto"), Training(**self.OPTIONS).run())
        self.assert_same_log(tmp_path)

    def test_two_go_on_where_two_stopped_to_the_bit(self, tmp_path):
        options = {**self.OPTIONS, "dropout": 0.4, "noise": 0.1, "checkpoint_steps": 3}
        run_on_two_processes(stop_on_rank, str(tmp_path), options)
        assert same(train_on_two(options, tmp_path, "auto"), train_on_two(options))

    def assert_same_log(self, folder):
        Training(folder / "whole", **self.OPTIONS).run()
        for ours, theirs in zip(lines_of(folder), lines_of(folder / "whole"), strict=True):
            assert ours["event"] == theirs["event"]
            assert ours["step"] == theirs["step"]
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE)


def stop_on_rank_alone(folder, options):
    with pytest.raises(KeyboardInterrupt):
        Training(folder, after_epoch=hold_two_epochs, **options).run()


class TestFullDisk:
    #: A model of 0.5 MB, whose optimizer has two more of these.
    LARGE: ClassVar = {
        "width": 4000,
        "samples": 10,
        "epochs": 4,
        "checkpoint_steps": 2,
        "log_steps": 1,
        "method": "plain",
    }

    def test_training_goes_on_when_files_cannot_grow(self, tmp_path):
        """The limit of the system on the size of a file: writes stop in the middle of ``model.pt``."""
        process = start(tmp_path, self.LARGE, limit={"epoch": 2, "bytes": 100_000})
        assert finish(process) == 1, "what it leaves at its end is too large, too"
        self.assert_went_on(tmp_path, "File too large")

    def test_training_goes_on_when_the_disk_is_full(self, tmp_path):
        size = self.checkpoint_size(tmp_path / "measured")
        disk = tmp_path / "disk"
        disk.mkdir()
        # Room for one and a half.
        if os.system(f"mount -t tmpfs -o size={int(1.5 * size)} none {disk} 2>/dev/null") != 0:
            pytest.skip("cannot mount a small file system here")
        try:
            folder = disk / "run"
            assert finish(start(folder, {**self.LARGE, "keep_checkpoints": 1})) in (0, 1)
            self.assert_went_on(folder, "No space left on device")
        finally:
            os.system(f"umount {disk}")

    def checkpoint_size(self, folder):
        assert finish(start(folder, {**self.LARGE, "epochs": 1})) == 0
        return sum(file.stat().st_size for path in folder.glob("checkpoint-*") for file in path.iterdir())

    def assert_went_on(self, folder, reason):
        lines = lines_of(folder)
        assert [line["epoch"] for line in lines if line["event"] == "epoch"] == [1, 2, 3, 4]
        said = [line["message"] for line in lines if line["event"] == "warning"]
        assert said
        assert all(
            f"no checkpoint could be written at step {step} " in text
            for step, text in zip((4, 6, 8)[-len(said) :], said)
        )
        assert all(reason in text and "Training goes on" in text for text in said)
        whole = sorted(folder.glob("checkpoint-*"))
        assert whole
        for path in whole:
            check(path)
        assert not list(folder.glob(".writing-*"))

    def test_lines_of_the_log_wait(self, tmp_path):
        log = RunLog(tmp_path / "no" / "log.jsonl")
        (tmp_path / "no").write_text("a file where the folder should be")
        with pytest.warns(UserWarning, match="Its lines wait"):
            log.write("step", {"step": 1})
        (tmp_path / "no").unlink()
        log.write("step", {"step": 2, "loss": float("nan")})
        assert [line["step"] for line in lines_of(tmp_path / "no")] == [1, 2]
        assert lines_of(tmp_path / "no")[1]["loss"] is None


def terminated_on_rank(rank, folder, options):
    as_rank(rank)

    def signal_myself(training, epoch):
        if epoch == 2 and training.engine.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with listening():
        try:
            Training(Path(folder), after_epoch=signal_myself, **options).run()
        except Terminated as stop:
            return stop.message, stop.code
    return None


class TestTermination:
    def test_all_processes_stop_at_the_step_at_which_one_was_asked(self, tmp_path):
        options = {"epochs": 4, "samples": 11}
        for message, code in run_on_two_processes(terminated_on_rank, str(tmp_path), options):
            assert code == 143
            assert "after step 6, with a checkpoint" in message
        assert same(train_on_two(options, tmp_path, "auto"), train_on_two(options))

    def test_outside_of_trainings_it_comes_at_once(self):
        with listening(), pytest.raises(Terminated) as stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.value.code == 143
        with listening(), deferred() as asked:
            assert not asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()


class TestInProcessesOfTheirOwn:
    def test_bfloat16_and_a_tracker(self, tmp_path):
        options = {"dtype": torch.float32, "method": "regularizer and feature", "checkpoint_steps": 2}
        assert finish(start(tmp_path / "plain", options)) == 0
        assert finish(start(tmp_path / "half", {**options, "precision": "bf16", "trackers": ("tensorboard",)})) == 0
        ours, theirs = outcome_of(tmp_path / "half"), outcome_of(tmp_path / "plain")
        assert not same(ours["model"], theirs["model"])
        for name, value in ours["model"].items():
            assert value.dtype == torch.float32
            assert (value - theirs["model"][name]).abs().max() < 0.1
        events = next((tmp_path / "half" / "small").glob("events.out.tfevents.*"))
        accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = accumulator.EventAccumulator(str(events.parent))
            found.Reload()
        names = found.Tags()["scalars"]
        assert "epoch/validation_error" in names
        assert "saliency/relation/a-b" in names
        assert "surgery/conflicts" in str(names)

    def test_trackers_leave_the_processes_together(self, tmp_path):
        options = {"dtype": torch.float32, "epochs": 1, "trackers": ("tensorboard",)}
        for _ in range(2):  # a second training finds the group of the first
            train_on_two(options, tmp_path)
        assert len(list((tmp_path / "small").glob("events.out.tfevents.*"))) == 2, "one for each training"
