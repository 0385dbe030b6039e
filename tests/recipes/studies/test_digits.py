"""The study of digits as a command, run for real on a few images and epochs."""

import base64
import csv
import json
import pickle
import statistics
import sys

import pytest
import torch

from recipes import digits
from recipes.digits import main
from recipes.methods.methods import METHODS, Method
from recipes.methods.surgeries import Surgery
from recipes.runtime.files import LOCK, locked
from recipes.studies.digit_cells import train_digits

from ..support.commands import call
from ..support.studies import TINY_DIGITS, lines_of, results_json, results_of, size_of_png, table_rows, tables_of

ALL = digits.METHODS
METRICS = ("accuracy", "auc", "precision", "recall")
WITH_RELATIONS = [key for key in ALL if METHODS[key].rule is not None]
PICTURES = ("learning_curves", "learning_curves_surgery", "conflicts", *(f"relations_{key}" for key in WITH_RELATIONS))
FEW = ("--epochs", "1", "--seeds", "1", "--workers", "1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and answer of one tiny run of everything."""
    out = tmp_path_factory.mktemp("runs")
    answer = call(main, *TINY_DIGITS, "--out", out, "--name", "all", "--workers", "1")
    assert answer.code == 0, answer.err
    return out / "all", answer


class TestRun:
    def test_results_json_has_everything(self, finished):
        content = results_json(finished[0])
        assert (content["schema_version"], content["recipe"], content["status"]) == (4, "digits", "complete")
        assert content["options"]["weight_decays"] == [0.0, 1.0]
        assert "out" not in content["options"]
        assert content["versions"]["torch"] == torch.__version__
        assert set(content["machine"]) == {"processor", "cores", "system"}
        assert content["processes"] == 1
        assert content["baseline"] == "hard_sharing"
        assert not set(content["seeds"]) & set(content["tuning_seeds"])
        (setting,) = content["settings"].values()
        assert setting["label"] == "Digits, 3 training images of each class"
        assert setting["values"]["batch_size"] == 10
        assert list(setting["methods"]) == list(ALL)
        for key, method in setting["methods"].items():
            assert len(method["trials"]) == 2, "every method has the same number of trials"
            scores = {trial["value"]: trial["validation"] for trial in method["trials"]}
            assert method["chosen"] == max(scores, key=scores.get)
            assert method["parameter"] == METHODS[key].parameter
            assert [result["seed"] for result in method["per_seed"]] == [0, 1]
            for name in METRICS:
                values = [result["macro"][name] for result in method["per_seed"]]
                assert 0 <= min(values) <= max(values) <= 1
                summary = method["summary"][name]
                assert summary["mean"] == pytest.approx(statistics.fmean(values))
                assert summary["low"] <= summary["mean"] <= summary["high"]
            for result in method["per_seed"]:
                assert list(result["scores"]) == [str(digit) for digit in range(10)]
                assert len(result["curves"]["validation_loss"]) == len(result["curves"]["validation_score"]) == 2

    def test_every_training_has_a_line(self, finished):
        folder, _ = finished
        lines = lines_of(folder / "results.jsonl")
        assert len(results_of(folder / "results.jsonl")) == len(ALL) * (2 + 2)
        for line in lines:
            assert bool(line["result"]["scores"]) == line["cell"]["reported"], "trials see no test split"
            assert line["cell"]["seed"] in ((0, 1) if line["cell"]["reported"] else (1000,))
            assert {"seconds", "date", "machine", "versions"} <= set(line["about"])

    def test_differences_are_paired_by_seed(self, finished):
        methods = results_json(finished[0])["settings"]["digits"]["methods"]
        ours, theirs = (methods[key]["per_seed"] for key in ("single_task", "hard_sharing"))
        mean = statistics.fmean(a["macro"]["auc"] - b["macro"]["auc"] for a, b in zip(ours, theirs))
        assert methods["single_task"]["difference"]["auc"]["mean"] == pytest.approx(mean)
        assert methods["hard_sharing"]["difference"] == {}

    def test_relations_of_every_regularizer_are_weights(self, finished):
        methods = results_json(finished[0])["settings"]["digits"]["methods"]
        for key, method in methods.items():
            for result in method["per_seed"]:
                assert (result["relations"] is not None) == (key in WITH_RELATIONS)
                if result["relations"] is not None:
                    matrix = torch.tensor(result["relations"])
                    assert torch.equal(matrix, matrix.T)
                    assert matrix.triu(1).sum() == pytest.approx(1.0)
                    assert matrix.std() > 0

    def test_pictures_are_large_enough_for_print(self, finished):
        for name in PICTURES:
            width, height = size_of_png(finished[0] / f"{name}.png")
            assert width > 900, name
            assert height > 600, name

    def test_page_shows_what_the_study_drew(self, finished):
        folder, answer = finished
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert answer.out.rstrip().endswith(f"Open this page in a browser: {(folder / 'report.html').as_uri()}")
        (sentence,) = [line for line in answer.out.splitlines() if line.startswith("Too few seeds. ")]
        assert sentence.removeprefix("Too few seeds. ") in text
        assert base64.b64encode((folder / "conflicts.png").read_bytes()).decode() in text
        assert "python -m recipes.digits --train-per-class 3 " in text

    def test_folder_holds_nothing_else(self, finished):
        names = {path.name for path in finished[0].iterdir()}
        tables = {f"results.{kind}" for kind in ("jsonl", "json", "md", "csv")}
        assert names == {".lock", "report.html", *tables, *(f"{name}.png" for name in PICTURES)}

    def test_printed_tables_are_those_of_the_files(self, finished):
        folder, answer = finished
        text = (folder / "results.md").read_text()
        assert tables_of(answer.out).rpartition("\n\n")[0] in text
        assert "### Tuning: Digits" in text
        rows = {row[0]: row for row in table_rows(answer.out)}
        content = results_json(folder)["settings"]["digits"]["methods"]
        for method in content.values():
            auc = method["summary"]["auc"]
            assert rows[method["label"]][4] == f"{100 * auc['mean']:.2f} +- {100 * auc['std']:.2f}"
        for line in csv.DictReader((folder / "results.csv").read_text().splitlines()):
            assert float(line["mean"]) == content[line["method"]]["summary"][line["metric"]]["mean"]
        assert "3 training and 3 validation images per class" in answer.out
        assert "difference in AUC" in answer.out

    def test_some_methods_with_relu_heads(self, tmp_path):
        arguments = ["--methods", "single_task", "srdml_authors", "--activation", "relu", *FEW, "--out", tmp_path]
        answer = call(main, *TINY_DIGITS, *arguments)
        assert answer.code == 0
        assert "trains the heads only" in answer.out
        assert "difference" not in answer.out
        assert not any("+-" in cell for row in table_rows(answer.out) for cell in row), "one seed has no deviation"
        assert (tmp_path / "results.jsonl").exists(), "a study without a name is in --out itself"

    def test_method_may_be_named_as_before(self, finished):
        folder, answer = finished
        place = ("--out", folder.parent, "--name", "all", "--minutes", "0")
        old = call(main, *TINY_DIGITS, *place, "--methods", "hard_sharing", "srdml_entropic", "pcgrad_feature")
        rows = {row[0]: row for row in table_rows(answer.out)}
        assert table_rows(old.out)[2:] == [rows[own] for own in ("Hard sharing", "SRDML", "PCGrad (feature)")]


class TestProgress:
    def test_lines_where_there_is_no_terminal(self, finished):
        lines = finished[1].err.splitlines()
        total = len(ALL) * 4
        assert lines[0].startswith(f"1 of {total} trainings (digits, single_task, seed 1000: validation score 0.")
        assert lines[-1].startswith(f"{total} of {total} trainings (digits, ")
        assert lines[-1].endswith(", 0 s left")
        assert len(lines) < total / 2, "not one for each"


class TestGoingOn:
    def test_finished_study_is_only_drawn_again(self, finished):
        folder, answer = finished
        before = (folder / "results.jsonl").read_bytes()
        (folder / "conflicts.png").unlink()
        again = call(main, *TINY_DIGITS, "--out", folder.parent, "--name", "all", "--workers", "1")
        assert (again.code, again.err) == (0, "")
        assert (folder / "results.jsonl").read_bytes() == before
        assert tables_of(again.out) == tables_of(answer.out)
        assert (folder / "conflicts.png").exists()

    def test_other_options_are_other_trainings(self, finished, tmp_path):
        """In the same folder, beside those that are there; more seeds only train what is missing."""
        path = tmp_path / "results.jsonl"
        place = ("--methods", "hard_sharing", "--results", path)
        assert call(main, *TINY_DIGITS, *FEW, *place).code == 0
        first = path.read_bytes()
        assert call(main, *TINY_DIGITS, *FEW, *place, "--seeds", "2").code == 0
        assert path.read_bytes().startswith(first)
        assert len(results_of(path)) == 4
        assert call(main, *TINY_DIGITS, *FEW, *place, "--batch-size", "9").code == 0
        assert len(results_of(path)) == 4 + 3
        assert results_json(tmp_path)["settings"]["digits"]["values"]["batch_size"] == 9

    def test_study_that_the_clock_stopped(self, tmp_path):
        path = tmp_path / "results.jsonl"
        place = ("--methods", "hard_sharing", "srdml", "--results", path)
        none = call(main, *TINY_DIGITS, *FEW, *place, "--minutes", "1e-9")
        assert none.code == 0
        assert "0 of 6 trainings are done" in none.out
        assert results_json(tmp_path)["status"] == "running"
        whole = call(main, *TINY_DIGITS, *FEW, *place, "--minutes", "5")
        assert "6 of 6 trainings are done" in whole.out
        assert results_json(tmp_path)["status"] == "complete"

    def test_only_tables_write_nothing(self, tmp_path):
        answer = call(main, *TINY_DIGITS, "--out", tmp_path / "none", "--minutes", "0")
        assert answer.code == 0
        assert f"0 of {len(ALL) * 4} trainings are done" in answer.out
        assert not (tmp_path / "none").exists()


class TestSearch:
    def test_as_many_trials_of_every_method(self, tmp_path):
        arguments = (*TINY_DIGITS, *FEW, "--weight-decays", "0.1", "1", "--trials", "3", "--out", tmp_path)
        methods = ("hard_sharing", "srdml", "single_task")
        first = call(main, *arguments, "--methods", *methods[:2])
        assert first.code == 0, first.err
        assert call(main, *arguments, "--methods", *methods).code == 0
        found = results_json(tmp_path)["settings"]["digits"]["methods"]
        assert len(results_of(tmp_path / "results.jsonl")) == 3 * (3 + 1)
        for key, method in found.items():
            values = [trial["value"] for trial in method["trials"]]
            assert len(set(values)) == 3, key
            assert all(0.1 <= value <= 1 for value in values)
        assert "Values tried for the hyper-parameter of each method: 3" in first.out

    def test_nothing_to_search_between(self, tmp_path):
        answer = call(main, *TINY_DIGITS, "--trials", "3", "--out", tmp_path / "none")
        assert answer.code == 1
        assert (
            "digits: error: there is nothing to search between the values 0, 1 of the weight decay" in answer.complaint
        )


def halves(seed):
    """The weighting of a method that a user adds."""
    del seed
    return lambda gramian: torch.full((len(gramian),), 0.5, dtype=gramian.dtype)


class TestOwnMethod:
    def test_appears_everywhere_and_trains(self, tmp_path, monkeypatch):
        monkeypatch.setattr(METHODS, "_methods", dict(METHODS))
        mine = METHODS.add(Method("halves", "Mine, halved", surgery=Surgery("Halves", halves), earlier=("half",)))
        help_text = call(main, "--help")
        assert "halves" in help_text.out
        place = ("--methods", "hard_sharing", "half", "--out", tmp_path)
        answer = call(main, *TINY_DIGITS, *FEW, *place)
        assert answer.code == 0, answer.err
        assert [row[0] for row in table_rows(answer.out)[2:]] == ["Hard sharing", "Mine, halved"]
        plain, own = (
            results_json(tmp_path)["settings"]["digits"]["methods"][key] for key in ("hard_sharing", mine.key)
        )
        assert own["per_seed"][0]["validation_loss"] != plain["per_seed"][0]["validation_loss"]
        assert pickle.loads(pickle.dumps(mine)) == mine, "it reaches workers"
        assert {line["cell"]["method"] for line in lines_of(tmp_path / "results.jsonl")} == {"hard_sharing", "halves"}


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            (["--epochs", "0"], "Pass a whole number from 1 on"),
            (["--seeds", "two"], "Pass a whole number from 1 on"),
            (["--seeds", "1001"], "Use --seeds 1000 or less"),
            (["--trials", "1"], "Pass a whole number from 2 on"),
            (["--minutes", "-1"], "Pass a finite number from 0 on"),
            (["--learning-rate", "0"], "Pass a finite number above 0"),
            (["--strengths", "-1"], "Pass a finite number from 0 on"),
            (["--strengths", "nan", "1", "2"], "Pass a finite number from 0 on"),
            (["--strengths", "1"], "Use as many of the one as of the other"),
            (["--strengths", "1", "1", "2"], "Use each value once"),
            (["--weight-decays", "1", "1", "2"], "argument --weight-decays: the same value twice"),
            (["--methods", "srdml_l1"], "found 'srdml_l1'. Did you mean srdml? Use one of hard_sharing, single_task"),
            (["--methods", "srdml", "srdml_entropic"], "argument --methods: the same value twice. Use each value once"),
            (["--settings", "letters"], "argument --settings: found 'letters'. Use some of digits"),
            (["--activation", "tanh"], "choose from"),
            (["--name", "a/b"], "Pass a plain folder name"),
            (["--train-per-class", "100"], "Use --train-per-class 77 or less"),
            (["--validation-per-class", "100"], "Use --validation-per-class 20"),
            (["--accumulation", "11"], "Use --accumulation 10 or less"),
            (["--mixed-precision", "bf16", "--dtype", "float64"], "Use --mixed-precision no, or --dtype float32"),
            (["--clip-norm", "0"], "Pass a finite number above 0"),
            (["--data-workers", "-1"], "Pass a whole number from 0 on"),
            (["--workers", "0"], "Pass a whole number from 1 on"),
            (
                ["--trials", "3", "--weight-decays", "0", "--strengths", "0.1"],
                "argument --trials: there is nothing to search",
            ),
            (["--results", "mine.jsonl"], "argument --out: --results names the folder, too"),
        ],
    )
    def test_bad_ones_say_what_to_type(self, arguments, hint, tmp_path):
        answer = call(main, *arguments, "--out", tmp_path)
        assert answer.code == 2
        assert hint in answer.complaint
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_fp16_without_a_gpu(self, tmp_path):
        answer = call(main, "--mixed-precision", "fp16", "--out", tmp_path)
        assert answer.code == 2
        assert "fp16 needs a GPU" in answer.complaint

    @pytest.mark.parametrize("name", ["mine.json", "mine.csv", "mine.md"])
    def test_results_where_tables_are_written(self, tmp_path, name):
        (tmp_path / name).write_text("kept")
        answer = call(main, *TINY_DIGITS, "--results", tmp_path / name)
        assert answer.code == 2
        assert "Use mine.jsonl" in answer.complaint
        assert (tmp_path / name).read_text() == "kept"

    def test_file_of_something_else(self, tmp_path):
        (tmp_path / "results.jsonl").write_text("notes\nof mine\n")
        answer = call(main, *TINY_DIGITS, "--out", tmp_path)
        assert answer.code == 1
        assert "digits: error: line 1 of" in answer.complaint
        assert "is no result" in answer.complaint
        assert "Traceback" not in answer.err
        assert (tmp_path / "results.jsonl").read_text() == "notes\nof mine\n"

    def test_folder_that_cannot_be(self, tmp_path):
        (tmp_path / "file").write_text("")
        answer = call(main, *TINY_DIGITS, "--out", tmp_path / "file")
        assert answer.code == 2
        assert "argument --results: cannot write in" in answer.complaint
        assert "Pass another file or --out" in answer.complaint

    @pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
    def test_folder_without_a_place_for_the_lock(self, tmp_path):
        """As in a folder that may only be read: before the trainings, and not after them."""
        (tmp_path / LOCK).mkdir()
        answer = call(main, *TINY_DIGITS, "--out", tmp_path)
        assert answer.code == 2
        assert f"argument --results: cannot write in {tmp_path}" in answer.complaint

    @pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
    def test_two_runs_in_one_folder(self, tmp_path):
        (tmp_path / "mine").mkdir()
        place = ("--out", tmp_path, "--name", "mine")
        with locked(tmp_path / "mine"):
            answer = call(main, *TINY_DIGITS, *place)
            assert call(main, *TINY_DIGITS, *place, "--minutes", "0").code == 0, "who only reads needs no lock"
        assert answer.code == 2
        assert f"another run is at work in {tmp_path / 'mine'}" in answer.complaint
        with locked(tmp_path / "mine"):
            pass

    def test_help_explains_every_option(self):
        text = " ".join(call(main, "--help").out.split())
        names = ("train-per-class", "seeds", "strengths", "weight-decays", "activation", "workers", "out", "name")
        for option in (*names, "results", "minutes", "trials", "methods", "settings", "tuning-seeds", "trackers"):
            assert f"--{option} " in text
        assert "0.03 0.1 0.3" in text


def test_cells_are_trained_by_the_function_of_the_study():
    assert digits.COMMAND.train is train_digits
    assert json.dumps(digits.METHODS)
    assert set(digits.METHODS) < set(METHODS)
