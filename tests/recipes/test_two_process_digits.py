"""The digits recipe started with several processes, killed, terminated and resumed, as users do it."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recipes.digits import main
from tests.support.two_processes import run_on_two_processes

from .small_training import as_rank

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

ROOT = Path(__file__).parents[2]
#: Batches of 7 images of 30: uneven for two processes, and a last one of 2.
TINY = [
    *("--train-per-class", "3", "--validation-per-class", "3", "--epochs", "2", "--seeds", "1", "--tuning-seeds", "1"),
    *("--weight-decays", "0", "--strengths", "1", "--dtype", "float64", "--batch-size", "7"),
]
METHODS = ["single_task", "srdml_authors", "srdml_pcgrad_feature", "srdml_pcgrad_parameters"]


def command(*arguments, launcher=()):
    return [sys.executable, *launcher, "-m", "recipes.digits", *TINY, "--methods", *METHODS, *arguments]


def environment():
    """Without what a launcher around the tests may have set."""
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**ours, "OMP_NUM_THREADS": "1"}


def run(arguments, timeout=120):
    return subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def numbers(folder):
    """All that was trained and measured."""
    content = read(folder)
    return {name: content[name] for name in ("methods", "relations", "learning_curves")}


def assert_close(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other):
            assert_close(ours, theirs)
    else:
        assert one == (pytest.approx(other, abs=1e-9) if isinstance(one, float) else other)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder and printed text of the run in one process."""
    out = tmp_path_factory.mktemp("alone")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*TINY, "--methods", *METHODS, "--out", str(out), "--name", "run", "--workers", "1"]) == 0
    return out / "run", printed.getvalue()


class TestTwoProcesses:
    def test_same_tables_as_one(self, alone, tmp_path):
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
        finished = run(command("--out", str(tmp_path), "--name", "run", launcher=launcher))
        assert finished.returncode == 0, finished.stderr
        folder, printed = alone
        assert self.tables(finished.stdout) == self.tables(printed)
        assert "shared by 2 processes" in finished.stdout
        assert finished.stdout.count("Written to") == 1, "only the main process prints"
        assert read(tmp_path / "run")["processes"] == 2
        assert_close(numbers(tmp_path / "run"), numbers(folder))
        assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in folder.iterdir()}

    @staticmethod
    def tables(text):
        return text[text.index("Tuning,") : re.search(r"\n\d+ s\. Written to", text).start()]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--workers", "2"], "Leave --workers out"),
            (["--name", "taken"], "Pass another --name"),  # seen by the main process only
        ],
    )
    def test_errors_end_all_processes(self, tmp_path, arguments, message):
        (tmp_path / "taken").mkdir()
        answers = run_on_two_processes(refused_on_rank, [*TINY, "--out", str(tmp_path), *arguments])
        assert [code for code, _ in answers] == [2, 2]
        assert message in " ".join(answers[0][1].split())
        assert [path.name for path in tmp_path.iterdir()] == ["taken"]

    def test_same_tables_as_one_in_float32(self, tmp_path):
        arguments = [*TINY, "--dtype", "float32", "--methods", "hard_sharing", "srdml_entropic", "--workers", "1"]
        with contextlib.redirect_stdout(io.StringIO()) as alone:
            assert main([*arguments, "--out", str(tmp_path), "--name", "alone"]) == 0
        answers = run_on_two_processes(run_on_rank, [*arguments, "--out", str(tmp_path), "--name", "both"])
        assert [code for code, _, _ in answers] == [0, 0]
        assert self.tables(answers[0][1]) == self.tables(alone.getvalue())

    def test_damaged_result_ends_all_processes_with_the_same_error(self, alone, tmp_path):
        folder = tmp_path / "run"
        shutil.copytree(alone[0], folder)
        damaged = next(folder.glob("trainings/*/result.json"))
        damaged.write_text("{")
        arguments = [*TINY, "--methods", *METHODS, "--resume", str(folder)]
        answers = run_on_two_processes(run_on_rank, arguments)
        assert [code for code, _, _ in answers] == [1, 1]
        for _, _, complaints in answers:
            assert f"{damaged} is no result of this version" in complaints
            assert "Remove it to train again" in complaints
            assert "Traceback" not in complaints


def run_on_rank(rank, arguments):
    as_rank(rank)
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()) as complaints,
    ):
        code = main(arguments)
    return code, printed.getvalue(), complaints.getvalue()


def refused_on_rank(rank, arguments):
    as_rank(rank)
    with contextlib.redirect_stderr(io.StringIO()) as complaints:
        try:
            main(arguments)
        except SystemExit as stop:
            return stop.code, complaints.getvalue()
    return None, ""


def begin(*arguments):
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished_in(folder):
    return sorted(path.parent.name for path in folder.glob("trainings/*/result.json"))


def interrupt(process, number, wanted):
    deadline = time.monotonic() + 60
    try:
        while not wanted():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        printed, complaints = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in complaints
    return printed


class TestResume:
    def test_goes_on_after_sigterm_and_after_sigkill(self, alone, tmp_path):
        folder = tmp_path / "run"
        place = ["--out", str(tmp_path), "--name", "run", "--resume", "auto"]

        process = begin(*place, "--workers", "2", "--checkpoint-steps", "2")
        printed = interrupt(
            process, signal.SIGTERM, lambda: finished_in(folder) and list(folder.glob("trainings/*/checkpoint-*"))
        )
        assert process.returncode == 143
        assert f"--out {tmp_path} --name run --resume auto" in printed
        assert read(folder)["status"] == "terminated"
        first = read(folder)
        assert [session["date"] for session in first["sessions"]] == [first["date"]]
        before = finished_in(folder)
        assert 1 <= len(before) < len(METHODS) * 2

        process = begin(*place, "--workers", "1")
        interrupt(process, signal.SIGKILL, lambda: len(finished_in(folder)) > len(before))
        assert process.returncode == -signal.SIGKILL
        done = finished_in(folder)
        assert len(before) < len(done) < len(METHODS) * 2

        moments = {name: (folder / "trainings" / name / "result.json").stat().st_mtime_ns for name in done}
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*TINY, "--methods", *METHODS, *place, "--workers", "1"]) == 0
        assert numbers(folder) == numbers(alone[0])
        content = read(folder)
        assert content["status"] == "complete"
        assert content["date"] == first["date"]
        assert len(content["sessions"]) == 3
        assert content["sessions"][0] == first["sessions"][0]
        assert content["wall_seconds"] == pytest.approx(sum(session["seconds"] for session in content["sessions"]))
        assert all(session["versions"] == content["versions"] for session in content["sessions"])
        assert not list(folder.glob("trainings/*/checkpoint-*"))
        for name, moment in moments.items():
            assert (folder / "trainings" / name / "result.json").stat().st_mtime_ns == moment, "trained twice"

    def test_finished_run_is_only_drawn_again(self, alone, tmp_path):
        folder, printed = alone
        before = (folder / "results.json").read_bytes()
        started = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()) as again:
            assert main([*TINY, "--methods", *METHODS, "--resume", str(folder), "--workers", "1"]) == 0
        assert time.monotonic() - started < 10
        assert (folder / "results.json").read_bytes() == before
        assert TestTwoProcesses.tables(again.getvalue()) == TestTwoProcesses.tables(printed)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--epochs", "3"], "had --epochs 2, but found 3. Pass the same options as before"),
            (["--methods", "single_task"], "had --methods single_task srdml_authors"),
        ],
    )
    def test_other_options_are_refused(self, alone, capsys, arguments, message):
        folder, _ = alone
        place = ["--out", str(folder.parent), "--name", folder.name, "--resume", "auto"]
        with pytest.raises(SystemExit):
            main([*TINY, "--methods", *METHODS, *arguments, *place])
        assert message in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--resume", "auto"], "Use --name, too"),
            (["--resume", "nowhere"], "Use auto, never, or the folder of a run"),
            (["--accumulation", "8"], "Use --accumulation 7 or less"),
            (["--mixed-precision", "bf16"], "Use --mixed-precision no, or --dtype float32"),
            (["--mixed-precision", "fp16", "--dtype", "float32"], "fp16 needs a GPU"),
            (["--clip-norm", "0"], "Pass a finite number above 0"),
            (["--data-workers", "-1"], "Pass a whole number from 0 on"),
        ],
    )
    def test_bad_options_say_what_to_type(self, tmp_path, capsys, arguments, message):
        with pytest.raises(SystemExit) as stop:
            main([*TINY, "--out", str(tmp_path), *arguments])
        assert stop.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not list(tmp_path.iterdir())
