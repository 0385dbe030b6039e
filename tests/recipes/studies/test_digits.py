"""The digits recipe, run for real on a few images and epochs."""

import contextlib
import errno
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from recipes.data.digits import TEST_IMAGES, digit_splits, most_per_class
from recipes.digits import main
from recipes.methods.attach import MGDA_UB, MGDA_UB_UNIT
from recipes.methods.conflicts import ConflictWatch
from recipes.models.small_networks import SharedNetwork, task_losses
from recipes.runs import command_line as recipe_arguments
from recipes.runtime.errors import need
from recipes.runtime.files import locked, new_run_folder, write_json
from recipes.studies import digit_training as training
from recipes.studies import study_run
from recipes.studies.comparison import METHODS, Comparison
from recipes.studies.digit_training import Job, Schedule, train
from recipes.studies.pictures import draw_conflicts, draw_learning_curves
from recipes.training.digit_metrics import METRICS, paired_difference, summarise, task_auc, task_metrics

ROOT = Path(__file__).parents[2]
TINY = [
    *("--train-per-class", "3", "--validation-per-class", "3", "--epochs", "2", "--seeds", "2", "--tuning-seeds", "1"),
    *("--weight-decays", "0", "1", "--strengths", "0.1", "1"),
]
RULES = ("projected", "entropic", "authors")
LEVELS = ("feature", "parameters")
WITH_RELATIONS = (*(f"srdml_{rule}" for rule in RULES), *(f"srdml_pcgrad_{level}" for level in LEVELS))
PICTURES = ("learning_curves", "learning_curves_surgery", "conflicts", *(f"relations_{key}" for key in WITH_RELATIONS))
SCHEDULE = Schedule(epochs=3, batch_size=10, learning_rate=5e-3, activation="gelu")
split = partial(digit_splits, train_per_class=3, validation_per_class=3)


def job(key, value=0.0, seed=0, reported=True):
    return Job(METHODS[key], value, seed, reported)


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def size_of_png(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and printed text of one tiny run of everything."""
    out = tmp_path_factory.mktemp("runs")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main([*TINY, "--out", str(out), "--name", "all", "--workers", "1"])
    assert code == 0
    return out / "all", printed.getvalue()


class TestRun:
    def test_results_json_has_everything(self, finished):
        folder, _ = finished
        content = read(folder)
        assert content["schema_version"] == 3
        assert content["status"] == "complete"
        assert content["wall_seconds"] > 0
        assert content["tasks"] == [str(digit) for digit in range(10)]
        assert content["options"]["weight_decays"] == [0.0, 1.0]
        assert content["versions"]["torch"] == torch.__version__
        assert set(content["machine"]) == {"processor", "cores", "system"}
        assert not set(content["seeds"]) & set(content["tuning_seeds"])
        assert set(content["methods"]) == set(METHODS)
        for key, method in content["methods"].items():
            assert len(method["tuning"]["trials"]) == 2, "every method has the same number of trials"
            areas = {trial["value"]: trial["validation_auc"] for trial in method["tuning"]["trials"]}
            assert method["tuning"]["chosen"] == max(areas, key=areas.get)
            assert [result["seed"] for result in method["per_seed"]] == [0, 1]
            for name in METRICS:
                values = [result[name] for result in method["per_seed"]]
                assert 0 <= min(values) <= max(values) <= 1
                assert method["summary"][name]["mean"] == pytest.approx(sum(values) / 2)
            curves = content["learning_curves"][key]
            assert len(curves["validation_loss"]["mean"]) == len(curves["validation_auc"]["std"]) == 2
            assert len(curves["validation_auc"]["per_seed"]) == 2
            assert ("conflicts" in curves) == METHODS[key].shared
            if METHODS[key].shared:
                shares = torch.tensor(curves["conflicts"]["per_seed"])
                assert 0 <= shares.min() <= shares.max() <= 1

    def test_differences_are_paired_by_seed(self, finished):
        content = read(finished[0])
        ours, theirs = (content["methods"][key]["per_seed"] for key in ("single_task", "hard_sharing"))
        mean = sum(a["auc"] - b["auc"] for a, b in zip(ours, theirs)) / 2
        assert content["difference_to_hard_sharing"]["single_task"]["summary"]["auc"]["mean"] == pytest.approx(mean)
        assert "hard_sharing" not in content["difference_to_hard_sharing"]

    def test_relations_of_every_regularizer_are_weights(self, finished):
        relations = read(finished[0])["relations"]
        assert set(relations) == set(WITH_RELATIONS)
        for key in WITH_RELATIONS:
            matrix = torch.tensor(relations[key]["mean"])
            assert relations[key]["tasks"] == [str(digit) for digit in range(10)]
            assert torch.equal(matrix, matrix.T)
            assert matrix.triu(1).sum() == pytest.approx(1.0)
            assert matrix.std() > 0

    def test_pictures_are_large_enough_for_print(self, finished):
        folder, _ = finished
        for name in PICTURES:
            width, height = size_of_png(folder / f"{name}.png")
            assert width > 900, name
            assert height > 600, name

    def test_folder_holds_nothing_else(self, finished):
        names = {path.name for path in finished[0].iterdir()}
        assert names == {".lock", "results.json", "trainings", *(f"{name}.png" for name in PICTURES)}

    def test_printed_table_is_what_the_file_says(self, finished):
        folder, text = finished
        methods = read(folder)["methods"]
        for method in methods.values():
            auc = method["summary"]["auc"]
            assert f"{100 * auc['mean']:.2f} +- {100 * auc['std']:.2f}" in text
        assert "accuracy %" in text
        assert "3 training and 3 validation images per class" in text
        assert "Difference to hard sharing" in text

    def test_both_levels_of_surgery_have_rows_of_their_own(self, finished):
        folder, text = finished
        content = read(folder)
        labels = {method["label"] for method in content["methods"].values()}
        for name in ("PCGrad", "SRDML w/ PCGrad"):
            for level in LEVELS:
                assert f"{name} ({level})" in labels
                for table in ("Tuning, ", "Test, ", "Difference "):
                    assert f"\n{name} ({level}) " in text.split(table)[1].split("\n\n")[0]
            assert name not in labels, "a level is always named"
        assert {"MGDA-UB", "MGDA-UB, unit gradients"} <= labels
        assert set(content["difference_to_hard_sharing"]) == set(METHODS) - {"hard_sharing"}
        for key, method in METHODS.items():
            expected = "weight decay" if method.rule is None else "strength"
            assert content["methods"][key]["tuning"]["parameter"] == expected

    def test_some_methods_with_relu_heads(self, tmp_path, capsys):
        arguments = ["--methods", "single_task", "srdml_authors", "--activation", "relu", "--seeds", "1"]
        assert main([*TINY, *arguments, "--epochs", "1", "--out", str(tmp_path), "--workers", "1"]) == 0
        printed, complaints = capsys.readouterr()
        assert "trains the heads only" in printed
        assert "Difference" not in printed
        assert "+-" not in printed.split("Test, ")[1].split("\n", 1)[1], "one seed has no deviation"
        assert complaints == ""
        (folder,) = tmp_path.iterdir()
        assert read(folder)["difference_to_hard_sharing"] == {}


class TestHonesty:
    def test_strength_zero_is_hard_sharing(self):
        plain = train(job("hard_sharing"), split, SCHEDULE)
        for rule in RULES:
            ours = train(job(f"srdml_{rule}"), split, SCHEDULE)
            assert ours.test == plain.test
            assert ours.curves == plain.curves
        other = train(job("srdml_projected", 1.0), split, SCHEDULE)
        assert other.curves["validation_loss"] != plain.curves["validation_loss"]

    def test_surgery_acts(self):
        """Every kind gives another model than hard sharing and than the others, from the same seed."""
        keys = ("hard_sharing", "pcgrad_feature", "pcgrad_parameters", "mgda_ub", "mgda_ub_unit")
        losses = [train(job(key), split, SCHEDULE).curves["validation_loss"] for key in keys]
        for index, one in enumerate(losses):
            assert one not in losses[:index], keys[index]

    @pytest.mark.parametrize("level", LEVELS)
    def test_srdml_with_surgery_at_strength_zero_is_that_surgery(self, level):
        plain, ours, other = (
            train(job(key, value), split, SCHEDULE)
            for key, value in ((f"pcgrad_{level}", 0.0), (f"srdml_pcgrad_{level}", 0.0), (f"srdml_pcgrad_{level}", 1.0))
        )
        assert ours.test == plain.test
        assert ours.curves == plain.curves
        assert other.curves["validation_loss"] != plain.curves["validation_loss"]

    def test_surgery_is_the_same_for_the_same_seed(self):
        for key in ("pcgrad_feature", "srdml_pcgrad_parameters"):
            one, same = (train(job(key, 0.1, seed=3), split, SCHEDULE) for _ in range(2))
            assert one == same

    def test_conflicts_are_those_of_the_task_gradients_at_the_feature_map(self):
        splits = split(0)
        torch.manual_seed(0)
        model = SharedNetwork(splits.tasks, "gelu")
        watch = ConflictWatch(model)
        for parameter in model.parameters():
            parameter.data *= 1.5
        feature = model.backbone(splits.train.inputs)
        losses = task_losses(
            {task: head(feature).squeeze(1) for task, head in model.heads.items()}, splits.train.labels
        )
        rows = torch.stack([torch.autograd.grad(loss, feature, retain_graph=True)[0].flatten() for loss in losses])
        products = (rows @ rows.T)[torch.triu_indices(10, 10, 1).unbind()]
        assert watch.measure(splits.train) == pytest.approx(float((products < 0).float().mean()))
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_mgda_prefers_small_gradients_and_its_variant_does_not(self):
        gramian = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
        assert MGDA_UB.weighting(0)(gramian).tolist() == pytest.approx([100 / 101, 1 / 101], abs=1e-3)
        assert MGDA_UB_UNIT.weighting(0)(gramian).tolist() == pytest.approx([0.5, 0.5])

    def test_training_leaves_the_random_state_alone(self):
        before = torch.get_rng_state()
        train(job("hard_sharing"), split, SCHEDULE)
        assert torch.equal(torch.get_rng_state(), before)

    def test_splits_are_disjoint_and_stratified(self):
        for seed in (0, 7):
            splits = digit_splits(seed, 10, 20)
            parts = [splits.train, splits.validation, splits.test]
            rows = [row for part in parts for row in part.rows]
            assert len(rows) == len(set(rows)) == 100 + 200 + TEST_IMAGES
            assert splits.train.labels.sum(0).tolist() == [10] * 10
            assert splits.validation.labels.sum(0).tolist() == [20] * 10
            counts = splits.test.labels.sum(0)
            assert counts.sum() == TEST_IMAGES
            assert counts.min() >= 76
            assert counts.max() <= 82
            assert splits.train.inputs.min() == -1
            assert splits.train.inputs.max() == 1

    def test_seeds_share_the_test_images_only(self):
        one, two = digit_splits(0, 10, 20), digit_splits(1, 10, 20)
        assert one.test.rows == two.test.rows
        assert one.train.rows != two.train.rows

    def test_trials_never_see_the_test_images(self):
        trained = train(job("hard_sharing", reported=False), split, SCHEDULE)
        assert trained.test == {}
        assert 0 < trained.validation_auc < 1

    def test_single_tasks_share_nothing(self):
        """Each network is the same as if its task were alone: other labels do not reach it, nor its best epoch."""

        def other_labels(seed):
            splits = split(seed)
            for part in (splits.train, splits.validation):
                part.labels[:, 1:] = part.labels[:, 1:].flip(1)
            return splits

        ours, theirs = (train(job("single_task"), data, SCHEDULE) for data in (split, other_labels))
        assert ours.test["auc"][0] == theirs.test["auc"][0]
        assert ours.best_epochs["0"] == theirs.best_epochs["0"]
        assert ours.test["auc"][1:] != theirs.test["auc"][1:]

    def test_best_epoch_is_the_one_of_the_highest_validation_auc(self):
        # A large learning rate makes the scores go up and down.
        schedule = Schedule(epochs=6, batch_size=10, learning_rate=0.05, activation="gelu")
        trained = train(job("hard_sharing"), split, schedule)
        areas = trained.curves["validation_auc"]
        assert trained.validation_auc == pytest.approx(max(areas))
        assert set(trained.best_epochs.values()) == {areas.index(max(areas)) + 1}
        assert trained.validation_loss == pytest.approx(trained.curves["validation_loss"][areas.index(max(areas))])

    def test_training_that_diverges_is_recorded(self):
        schedule = Schedule(epochs=1, batch_size=10, learning_rate=1e30, activation="gelu")
        trained = train(job("hard_sharing"), split, schedule)
        assert trained.best_epochs == {str(digit): 0 for digit in range(10)}
        assert trained.validation_auc == -float("inf")

    def test_value_is_chosen_by_the_mean_over_the_tuning_seeds(self):
        comparison = Comparison([METHODS["hard_sharing"]], {"weight decay": [0.0, 1.0]}, [8, 9], [0], ["0"])
        areas = {(0.0, 8): 0.9, (1.0, 8): 0.8, (0.0, 9): 0.1, (1.0, 9): 0.7}

        def pretend(jobs):
            for wanted in jobs:
                trained = train(wanted, split, Schedule(1, 30, 1e-3, "relu"))
                trained.validation_auc = areas.get((wanted.value, wanted.seed), 0.0)
                yield trained

        *_, last = comparison.run(pretend)
        assert last.job == Job(METHODS["hard_sharing"], 1.0, 0, reported=True)


class TestMetrics:
    def test_known_values(self):
        logits = torch.tensor([[2.0, -1.0], [1.0, -2.0], [-1.0, -3.0], [-2.0, -4.0]])
        labels = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
        metrics = task_metrics(logits, labels)
        assert metrics["accuracy"] == [0.5, 0.75]
        assert metrics["auc"] == [0.5, 1.0]
        assert metrics["precision"] == [0.5, 0.0]
        assert metrics["recall"] == [0.5, 0.0]

    def test_auc_is_that_of_scikit_learn(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randint(0, 9, (60, 4), generator=generator).float()  # with ties
        labels = (torch.rand(60, 4, generator=generator) < 0.3).float()
        assert task_auc(logits, labels).tolist() == pytest.approx(task_metrics(logits, labels)["auc"])
        assert task_auc(logits * float("nan"), labels).isnan().all()

    def test_summary(self):
        ours = {0: dict.fromkeys(METRICS, 0.5), 1: dict.fromkeys(METRICS, 0.7), 2: dict.fromkeys(METRICS, 0.0)}
        theirs = {0: dict.fromkeys(METRICS, 0.4), 1: dict.fromkeys(METRICS, 0.4)}
        seeds, difference = paired_difference(ours, theirs)
        assert seeds == [0, 1]
        assert difference["auc"]["mean"] == pytest.approx(0.2)
        assert difference["auc"]["std"] == pytest.approx(0.1 * 2**0.5)
        assert summarise([ours[0]])["auc"] == {"mean": 0.5, "std": None}
        assert paired_difference({}, theirs) == ([], {})


class TestInterrupt:
    @pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
    def test_leaves_what_was_finished(self, finished, tmp_path):
        command = [sys.executable, "-m", "recipes.digits", *TINY, "--seeds", "300", "--out", str(tmp_path)]
        command += ["--methods", "hard_sharing", "srdml_entropic", "--name", "stopped", "--workers", "2"]
        # A shell that started pytest in the background may have left the signal ignored, which is inherited.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
        finally:
            signal.signal(signal.SIGINT, before)
        try:
            folder = tmp_path / "stopped"
            deadline = time.monotonic() + 60
            while not ((folder / "results.json").exists() and self.seeds_done(folder) >= 2):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
            printed, complaints = process.communicate(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        assert process.returncode == 130, complaints
        assert "Traceback" not in complaints
        assert "Interrupted" in printed
        assert "AUC %" in printed
        assert read(folder)["status"] == "interrupted"
        assert 2 <= self.seeds_done(folder) < 300
        assert size_of_png(folder / "relations_srdml_entropic.png")
        assert size_of_png(folder / "learning_curves.png")
        # Another run in other processes, to the last digit.
        for key, method in read(folder)["methods"].items():
            uninterrupted = read(finished[0])["methods"][key]
            assert method["per_seed"][:2] == uninterrupted["per_seed"]
            assert method["tuning"] == uninterrupted["tuning"]

    @staticmethod
    def seeds_done(folder):
        return len(read(folder)["methods"]["srdml_entropic"]["per_seed"])


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            (["--epochs", "0"], "Pass a whole number from 1 on"),
            (["--seeds", "two"], "Pass a whole number from 1 on"),
            (["--seeds", "1001"], "Use --seeds 1000 or less"),
            (["--learning-rate", "0"], "Pass a finite number above 0"),
            (["--strengths", "-1"], "Pass a finite number from 0 on"),
            (["--strengths", "nan", "1", "2"], "Pass a finite number from 0 on"),
            (["--strengths", "1"], "Use as many of the one as of the other"),
            (["--strengths", "1", "1", "2"], "Use each value once"),
            (["--methods", "srdml"], "choose from"),
            (["--methods", "pcgrad"], "choose from"),
            (["--activation", "tanh"], "choose from"),
            (["--name", "a/b"], "Pass a plain folder name"),
            (["--train-per-class", "100"], "Use --train-per-class 77 or less"),
            (["--validation-per-class", "100"], "Use --validation-per-class 20"),
        ],
    )
    def test_bad_ones_say_what_to_type(self, arguments, hint, tmp_path, capsys):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert hint in " ".join(capsys.readouterr().err.split())
        assert not list(tmp_path.iterdir())

    def test_name_that_is_taken(self, tmp_path, capsys):
        (tmp_path / "mine").mkdir()
        with pytest.raises(SystemExit) as stop:
            main(["--out", str(tmp_path), "--name", "mine"])
        assert stop.value.code == 2
        assert "Pass another --name" in capsys.readouterr().err

    @pytest.mark.parametrize(("tracker", "package"), [("wandb", "wandb"), ("comet_ml", "comet-ml")])
    def test_tracker_that_is_not_installed(self, tracker, package, monkeypatch, tmp_path, capsys):
        monkeypatch.setitem(sys.modules, tracker, None)
        with pytest.raises(SystemExit) as stop:
            main(["--out", str(tmp_path), "--trackers", tracker])
        assert stop.value.code == 2
        complaints = " ".join(capsys.readouterr().err.split())
        assert f"{tracker} needs the package {package}" in complaints
        assert complaints.endswith(f"Run: pip install {package}")
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
    def test_two_runs_in_one_folder(self, tmp_path, capsys):
        place = ["--out", str(tmp_path), "--name", "mine", "--resume", "auto"]
        (tmp_path / "mine").mkdir()
        with locked(tmp_path / "mine"), pytest.raises(SystemExit) as stop:
            main([*TINY, *place])
        assert stop.value.code == 2
        complaints = " ".join(capsys.readouterr().err.split())
        assert str(tmp_path / "mine" / ".lock") in complaints
        assert "Pass another --name, or stop the other run" in complaints
        with locked(tmp_path / "mine"):
            pass

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "has no results.json"),
            ("{", "cannot be read"),
            ("[]", "is of the recipe None with schema version None, expected 'digits' with 3"),
            ('{"recipe": "synthetic", "schema_version": 3}', "is of the recipe 'synthetic' with schema version 3"),
            ('{"recipe": "digits", "schema_version": 2}', "with schema version 2, expected 'digits' with 3"),
        ],
    )
    def test_resume_takes_runs_of_this_recipe_only(self, content, message, tmp_path, capsys):
        if content is not None:
            (tmp_path / "results.json").write_text(content)
        before = list(tmp_path.iterdir())
        with pytest.raises(SystemExit) as stop:
            main(["--resume", str(tmp_path)])
        assert stop.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert list(tmp_path.iterdir()) == before

    def test_only_the_first_process_complains(self, monkeypatch, capsys):
        monkeypatch.setattr(recipe_arguments, "SECONDS_OF_SILENCE", 0.0)
        monkeypatch.setenv("RANK", "1")
        for option, code in (("--epochs=0", 2), ("--help", 0)):
            with pytest.raises(SystemExit) as stop:
                main([option])
            assert stop.value.code == code
        assert capsys.readouterr() == ("", "")
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(SystemExit):
            main(["--epochs=0"])
        assert "Pass a whole number" in capsys.readouterr().err

    def test_help_explains_every_option(self, capsys):
        with pytest.raises(SystemExit):
            main(["--help"])
        text = " ".join(capsys.readouterr().out.split())
        for option in (
            "train-per-class",
            "seeds",
            "strengths",
            "weight-decays",
            "activation",
            "workers",
            "out",
            "name",
        ):
            assert f"--{option} " in text
        assert most_per_class() == 97


class TestFullDisk:
    ARGUMENTS = (
        *TINY,
        "--epochs",
        "1",
        "--seeds",
        "1",
        "--methods",
        "hard_sharing",
        "--workers",
        "1",
        "--name",
        "full",
    )

    def test_run_goes_on_and_says_what_is_missing(self, monkeypatch, tmp_path, capsys):
        def refuse(path, content):
            raise OSError(errno.ENOSPC, "No space left on device")

        arguments = [*self.ARGUMENTS, "--out", str(tmp_path), "--resume", "auto"]
        with monkeypatch.context() as full:
            full.setattr(training, "write_json", refuse)
            full.setattr(study_run, "write_json", refuse)
            with pytest.warns(UserWarning, match="could not be written") as warned:
                assert main(arguments) == 1
        texts = [str(warning.message) for warning in warned]
        assert len([text for text in texts if text.startswith("results.json")]) == 1, "said once"
        assert len(texts) == 4
        printed = capsys.readouterr().out
        assert "AUC %" in printed
        missing = printed.split("Not written: ")[1]
        assert missing.count("result.json (No space left on device)") == 3
        assert "results.json (No space left on device)" in missing

        assert main(arguments) == 0
        assert read(tmp_path / "full")["status"] == "complete"
        assert "Not written" not in capsys.readouterr().out

    def test_short_shortage_leaves_nothing_missing(self, monkeypatch, tmp_path, capsys):
        calls = []

        def refuse_once(path, content):
            calls.append(path)
            if len(calls) == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            write_json(path, content)

        monkeypatch.setattr(study_run, "write_json", refuse_once)
        with pytest.warns(UserWarning, match="could not be written"):
            assert main([*self.ARGUMENTS, "--out", str(tmp_path)]) == 0
        assert "Not written" not in capsys.readouterr().out


class TestHouse:
    def test_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(ImportError, match=r'needs scikit-learn.*pip install "saliency-reg\[recipes\]"'):
            need("sklearn")

    def test_json_is_whole_or_absent(self, tmp_path):
        path = tmp_path / "results.json"
        write_json(path, {"loss": float("nan"), "curve": (1.0, float("inf"))})
        assert json.loads(path.read_text()) == {"loss": None, "curve": [1.0, None]}
        with pytest.raises(TypeError):
            write_json(path, {"loss": object()})
        assert json.loads(path.read_text()) == {"loss": None, "curve": [1.0, None]}
        assert list(tmp_path.iterdir()) == [path]

    def test_two_runs_within_a_second(self, tmp_path):
        assert new_run_folder(tmp_path, None) != new_run_folder(tmp_path, None)

    def test_curves_with_gaps_are_drawn(self, tmp_path):
        statistic = {"mean": [0.5, float("nan"), 1.0], "std": [0.0, 0.0, 0.0]}
        curves = {"a": {"seeds": [0], "validation_loss": statistic, "validation_auc": statistic}}
        draw_learning_curves(tmp_path / "two.png", curves, {"a": "A"})
        draw_conflicts(tmp_path / "three.png", {"b": {"seeds": [0, 1], "conflicts": statistic}}, {"a": "A", "b": "B"})
        for name in ("two", "three"):
            assert size_of_png(tmp_path / f"{name}.png")
