"""The study of digits killed, terminated, interrupted, with a full disk, and in several processes, as users have it."""

import errno
import json
import signal
import sys
from pathlib import Path

import pytest

from recipes.digits import main
from recipes.studies import command, written
from tests.support.two_processes import run_on_two_processes

from ..support.commands import call, call_on_rank, run_in_child, start, stop
from ..support.studies import lines_of, results_json, results_of, size_of_png, tables_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

#: Batches of 7 images of 30: uneven for two processes, and a last one of 2.
TINY = (
    *("--train-per-class", "3", "--validation-per-class", "3", "--epochs", "2", "--seeds", "1", "--tuning-seeds", "1"),
    *("--weight-decays", "0", "0.1", "--strengths", "0.1", "1", "--dtype", "float64", "--batch-size", "7"),
)
METHODS = ("single_task", "srdml_authors", "srdml+pcgrad", "srdml+pcgrad@parameters")
TRAININGS = len(METHODS) * 3
COMMAND = (*TINY, "--methods", *METHODS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder and answer of the study in one process, without a break."""
    out = tmp_path_factory.mktemp("alone")
    answer = call(main, *COMMAND, "--out", out, "--workers", "1")
    assert answer.code == 0, answer.err
    return out, answer


def done_in(folder):
    return len(lines_of(folder / "results.jsonl"))


def assert_close(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            if key == "penalty_share":  # a report in single precision
                assert one[key] == pytest.approx(other[key], rel=1e-5)
            else:
                assert_close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for ours, theirs in zip(one, other):
            assert_close(ours, theirs)
    else:
        assert one == (pytest.approx(other, abs=1e-9) if isinstance(one, float) else other)


class TestKilled:
    def test_goes_on_after_sigterm_and_after_sigkill(self, alone, tmp_path):
        """With workers and with checkpoints; numbers are those of a study without a break, to the last digit."""
        place = ("--out", tmp_path, "--name", "run")
        folder = tmp_path / "run"
        process = start("recipes.digits", *COMMAND, *place, "--workers", "2", "--checkpoint-steps", "2")
        answer = stop(
            process, signal.SIGTERM, lambda: done_in(folder) and list(folder.glob("trainings/*/checkpoint-*"))
        )
        assert answer.code == 143, answer.err
        assert "Traceback" not in answer.err
        assert "Terminated. Run the same command again to go on." in answer.out
        first = (folder / "results.jsonl").read_bytes()
        before = done_in(folder)
        assert 1 <= before < TRAININGS
        assert list(folder.glob("trainings/*/checkpoint-*")), "of what was not finished"

        process = start("recipes.digits", *COMMAND, *place, "--workers", "1")
        answer = stop(process, signal.SIGKILL, lambda: done_in(folder) > before)
        assert answer.code == -signal.SIGKILL
        assert before < done_in(folder) < TRAININGS

        assert call(main, *COMMAND, *place, "--workers", "1").code == 0
        assert (folder / "results.jsonl").read_bytes().startswith(first)
        assert results_of(folder / "results.jsonl") == results_of(alone[0] / "results.jsonl")
        assert results_json(folder)["settings"] == results_json(alone[0])["settings"]
        assert results_json(folder)["status"] == "complete"
        assert not (folder / "trainings").exists()


class TestInterrupted:
    def test_leaves_what_was_finished(self, alone, tmp_path):
        """Ctrl-C in a terminal, which the workers get, too."""
        arguments = (*TINY, "--methods", *METHODS[:2], "--seeds", "300", "--out", tmp_path, "--workers", "2")
        process = start("recipes.digits", *arguments)
        answer = stop(process, signal.SIGINT, lambda: done_in(tmp_path) >= 4 + 2 + 1)
        assert answer.code == 130, answer.err
        assert "Traceback" not in answer.err
        assert "Interrupted. What follows is from the trainings that were finished." in answer.out
        assert "AUC %" in answer.out
        content = results_json(tmp_path)
        assert content["status"] == "interrupted"
        for name in ("relations_srdml_authors", "learning_curves"):
            assert size_of_png(tmp_path / f"{name}.png")
        assert (tmp_path / "results.md").exists()
        # Other processes than those of the study without a break: to the last digit.
        whole = results_of(alone[0] / "results.jsonl")
        expected = {cell: result for cell, result in whole.items() if json.loads(cell)["method"] in METHODS[:2]}
        found = results_of(tmp_path / "results.jsonl")
        assert set(expected) <= set(found)
        assert {cell: found[cell] for cell in expected} == expected
        assert len(expected) < len(found) < 4 + 300 * 2


class TestTwoProcesses:
    def test_same_results_as_one(self, alone, tmp_path):
        answer = run_in_child("recipes.digits", *COMMAND, "--out", tmp_path, processes=2)
        assert answer.code == 0, answer.err
        folder, single = alone
        assert tables_of(answer.out) == tables_of(single.out)
        assert "Each training is shared by 2 processes, the batch included." in answer.out
        assert answer.out.count("trainings are done") == 1, "only the main process prints"
        assert answer.err.count(f"{TRAININGS} of {TRAININGS} trainings (") == 1
        assert results_json(tmp_path)["processes"] == 2
        assert_close(results_of(tmp_path / "results.jsonl"), results_of(folder / "results.jsonl"))
        assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}

    def test_same_tables_as_one_in_float32(self, tmp_path):
        arguments = [*TINY, "--dtype", "float32", "--methods", "hard_sharing", "srdml", "--workers", "1"]
        alone = call(main, *arguments, "--out", tmp_path / "alone")
        answers = run_on_two_processes(call_on_rank, main, [*arguments, "--out", str(tmp_path / "both")])
        assert [code for code, _, _ in answers] == [0, 0]
        assert tables_of(answers[0][1]) == tables_of(alone.out)
        assert answers[1][1] == ""

    def test_workers_are_refused_in_all_processes(self, tmp_path):
        answers = run_on_two_processes(call_on_rank, main, [*TINY, "--out", str(tmp_path), "--workers", "2"])
        assert [code for code, _, _ in answers] == [2, 2]
        assert "Leave --workers out" in " ".join(answers[0][2].split())
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", ["folder", "notes"])
    def test_what_only_the_main_process_sees_ends_both(self, tmp_path, kind):
        """A file in place of the folder, or a file of results that is none."""
        place, code, message = tmp_path / "place", 2, "cannot write in"
        if kind == "folder":
            place.write_text("")
        else:
            place.mkdir()
            (place / "results.jsonl").write_text("notes of mine\n")
            code, message = 1, "is no result"
        answers = run_on_two_processes(call_on_rank, main, [*TINY, "--out", str(place)])
        assert [own for own, _, _ in answers] == [code, code]
        assert message in " ".join(answers[0][2].split())
        assert all("Traceback" not in complaints for _, _, complaints in answers)


class TestFullDisk:
    ARGUMENTS = (*TINY, "--epochs", "1", "--methods", "hard_sharing", "--workers", "1")

    @pytest.fixture
    def disk(self, monkeypatch):
        """Full as long as its list is empty: what writes results, tables and numbers fails."""
        freed: list[str] = []
        open_file, write_text, write_json = Path.open, Path.write_text, written.write_json

        def refuse(write):
            def writing(path, *arguments, **options):
                mode = arguments[0] if write is open_file and arguments else options.get("mode", "r")
                if not freed and (write is not open_file or mode in ("wb", "r+b")):
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(path, *arguments, **options)

            return writing

        monkeypatch.setattr(Path, "open", refuse(open_file))
        monkeypatch.setattr(Path, "write_text", refuse(write_text))
        monkeypatch.setattr(written, "write_json", refuse(write_json))
        return freed

    def test_run_goes_on_and_says_what_is_missing(self, disk, tmp_path):
        with pytest.warns(UserWarning, match="could not be written") as warned:
            answer = call(main, *self.ARGUMENTS, "--out", tmp_path)
        assert answer.code == 1
        assert len(warned) == 1, "said once"
        assert "| Hard sharing |" in answer.out
        assert answer.out.index("3 of 3 trainings are done") < answer.out.index("Not written: "), (
            "the table comes first"
        )
        missing = answer.out.partition("Not written: ")[2]
        for name in ("results.jsonl", "results.md", "results.csv", "results.json", "report.html"):
            assert f"{name} (No space left on device)" in missing
        assert not (tmp_path / "results.jsonl").exists()

        disk.append("space")
        again = call(main, *self.ARGUMENTS, "--out", tmp_path)
        assert again.code == 0
        assert "Not written" not in again.out
        assert tables_of(again.out) == tables_of(answer.out)
        assert results_json(tmp_path)["status"] == "complete"

    def test_short_shortage_leaves_nothing_missing(self, disk, tmp_path, monkeypatch):
        """There is space again when the last training ends: what waited is written."""
        add = command.Study.run

        def freeing(study, *arguments):
            for count, found in enumerate(add(study, *arguments)):
                if count == 1:
                    disk.append("space")
                yield found

        monkeypatch.setattr(command.Study, "run", freeing)
        with pytest.warns(UserWarning, match="could not be written"):
            answer = call(main, *self.ARGUMENTS, "--out", tmp_path)
        assert answer.code == 0
        assert "Not written" not in answer.out
        assert done_in(tmp_path) == 3
        second = call(main, *self.ARGUMENTS, "--out", tmp_path)
        assert second.err == "", "nothing is trained again"
