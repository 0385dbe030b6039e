"""CIFAR-MTL, run for real on a few images of its own."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch

from recipes import cifar_mtl
from recipes.data.images.cifar import CLASSES, cifar_splits
from recipes.data.task_kinds import BINARY
from recipes.models.small_resnet import register_small_backbone
from recipes.runtime.errors import need
from recipes.runtime.log import CLOCK_FIELDS
from recipes.training.metrics import task_scores
from saliency_reg.integrations.timm import TimmMultiTaskModel
from tests.support.two_processes import run_on_two_processes

from ..support.small_images import QUICK, write_cifar
from ..support.small_training import as_rank

pytestmark = pytest.mark.usefixtures("quiet_hub")

IMAGES = ("--train-images", "60", "--validation-images", "20")
FILES = {"learning_curves.png", "log.jsonl", "model", "results.json", "saliency.png", ".lock"}
RELATIONS = {"relations.png", "task_tree.png"}
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


def run(data, out, name, *arguments):
    """Exit code and printed text."""
    place = ["--data", data, "--out", str(out), "--name", name]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = cifar_mtl.main([*QUICK, *IMAGES, *place, *arguments])
    return code, printed.getvalue()


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def numbers(folder):
    content = read(folder)
    return {name: content[name] for name in ("best_epoch", "validation", "macro", "scores", "curves", "relations")}


def names_in(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")}


def scores_of(folder, data, seed=0):
    """Of the model that was kept, on the test images."""
    register_small_backbone()
    model = TimmMultiTaskModel.from_pretrained(folder / "model").eval().to(memory_format=torch.channels_last)
    splits = cifar_splits(data, seed=seed, train_images=60, validation_images=20)
    images, labels = splits.test.rows_as_batch(range(len(splits.test)))
    with torch.no_grad():
        outputs = torch.stack(list(model(images).values()), dim=1)
    return task_scores(outputs, labels, dict.fromkeys(splits.tasks, BINARY))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Folder and printed text of one run with a penalty, surgery and pretraining."""
    out = tmp_path_factory.mktemp("runs")
    code, printed = run(data, out, "one", "--method", "srdml_pcgrad", "--pretraining-epochs", "1")
    assert code == 0
    return out / "one", printed


class TestRun:
    def test_results_json_has_everything(self, finished):
        content = read(finished[0])
        assert (content["recipe"], content["status"], content["schema_version"]) == ("cifar_mtl", "complete", 1)
        assert content["options"]["method"] == "srdml+pcgrad"
        assert "name" not in content["options"]
        assert content["versions"]["torch"] == torch.__version__
        assert content["processes"] == 1
        assert list(content["kinds"]) == list(content["scores"]) == list(CLASSES)
        assert content["curves"]["epoch"] == [1.0, 2.0]
        assert content["best_epoch"] in (1, 2)
        assert content["validation"] == max(content["curves"]["validation_score"])
        assert torch.tensor(content["relations"]).triu(1).sum() == pytest.approx(1.0)
        aucs = [own["auc"] for own in content["scores"].values()]
        assert content["macro"]["auc"] == pytest.approx(sum(aucs) / 10)

    def test_files(self, finished):
        folder, _ = finished
        assert names_in(folder) == FILES | RELATIONS | {"pretraining"}
        assert {path.name for path in (folder / "model").iterdir()} == {
            "README.md",
            "config.json",
            "model.safetensors",
            "tasks.json",
        }
        assert {path.stat().st_mode & 0o777 for path in (folder / "model").iterdir()} == {0o644}
        for name in ("learning_curves", "saliency", "relations", "task_tree"):
            assert (folder / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    def test_printed_table_is_what_the_file_says(self, finished):
        folder, printed = finished
        content = read(folder)
        assert "CIFAR-10, 10 tasks: 60 training, 20 validation and 20 test images of 32x32." in printed
        assert "SRDML w/ PCGrad (feature) on saliency_reg_resnet8." in printed
        assert f"Best weights by validation: epoch {content['best_epoch']}. Test:" in printed
        for task, own in content["scores"].items():
            line = next(line for line in printed.splitlines() if line.startswith(task))
            assert line.split()[1:] == [
                "20",
                *(f"{own[name]:.4f}" for name in ("accuracy", "auc", "precision", "recall")),
            ]

    def test_model_that_was_kept_has_these_scores(self, finished, data):
        found = scores_of(finished[0], data)
        expected = read(finished[0])["scores"]
        assert {task: pytest.approx(own) for task, own in found.items()} == expected

    def test_resume_of_a_complete_run_says_so(self, finished, data):
        folder, _ = finished
        before = (folder / "results.json").read_bytes()
        options = ("--method", "srdml_pcgrad", "--pretraining-epochs", "1", "--resume")
        for resume in ("auto", str(folder)):
            code, printed = run(data, folder.parent, "one", *options, resume)
            assert (code, printed) == (0, f"The run in {folder} is complete. Pass another --name to train again.\n")
        assert (folder / "results.json").read_bytes() == before

    @pytest.mark.parametrize("method", ["srdml_entropic", "hard_sharing", "pcgrad_parameters", "srdml_authors"])
    def test_methods(self, data, tmp_path, method):
        activation = ("--activation", "tanh") if method == "srdml_authors" else ()
        assert run(data, tmp_path, "one", "--method", method, "--epochs", "1", *activation)[0] == 0
        content = read(tmp_path / "one")
        with_relations = method.startswith("srdml")
        assert (content["relations"] is not None) is with_relations
        assert names_in(tmp_path / "one") == FILES | (RELATIONS if with_relations else set())
        assert 0 <= content["macro"]["auc"] <= 1

    def test_few_labels_and_other_tasks(self, data, tmp_path):
        code, printed = run(data, tmp_path, "one", "--tasks", "attributes", "--labelled", "0.2", "--epochs", "1")
        assert code == 0
        assert "CIFAR-10, 15 tasks" in printed
        assert math.isfinite(read(tmp_path / "one")["validation"])

    def test_training_that_diverged_is_no_success_in_silence(self, data, tmp_path):
        code, printed = run(data, tmp_path, "one", "--learning-rate", "1e30", "--epochs", "1")
        assert code == 0
        assert "The model keeps its first weights: no epoch had a validation score" in printed
        assert read(tmp_path / "one")["validation"] is None


def process(data, out, quiet_hub, arguments):
    """In a process of its own; ends with the exit code."""
    datasets = need("datasets")
    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = quiet_hub
    datasets.disable_progress_bars()
    sys.exit(run(data, out, "killed", *arguments)[0])


def terminated(started, wanted):
    deadline = time.monotonic() + 90
    while not wanted():
        assert started.is_alive(), started.exitcode
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(started.pid, signal.SIGTERM)
    started.join(60)
    return started.exitcode


def log_of(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK_FIELDS} for line in lines]


@posix
class TestTermination:
    def test_resumed_run_is_the_same_to_the_bit(self, data, tmp_path, quiet_hub):
        """Terminated in the pretraining, and again in the training."""
        options = ("--epochs", "4", "--pretraining-epochs", "4", "--checkpoint-steps", "1", "--method", "srdml_pcgrad")
        assert run(data, tmp_path, "alone", *options)[0] == 0
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.recipes.runs.test_cifar_mtl", "accelerate.accelerator", "datasets"])
        folder = tmp_path / "killed"
        for place in (folder / "pretraining", folder):
            started = context.Process(target=process, args=(data, tmp_path, quiet_hub, [*options, "--resume", "auto"]))
            started.start()
            code = terminated(started, lambda: list(place.glob("checkpoint-*")))  # noqa: B023
            assert code == 143
            assert read(folder)["status"] == "running"
            assert not (folder / "model").exists()
        assert (folder / "log.jsonl").exists()
        assert run(data, tmp_path, "killed", *options, "--resume", "auto")[0] == 0
        alone = tmp_path / "alone"
        assert numbers(folder) == numbers(alone)
        weights = [(own / "model" / "model.safetensors").read_bytes() for own in (folder, alone)]
        assert weights[0] == weights[1]
        for log in ("log.jsonl", "pretraining/log.jsonl"):
            assert log_of(folder / log) == log_of(alone / log)


def on_rank(rank, data, out, cache, arguments):
    datasets = need("datasets")
    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    as_rank(rank)
    return run(data, out, "both", *arguments)


class TestTwoProcesses:
    @pytest.mark.parametrize("method", ["srdml_pcgrad", "pcgrad_parameters"])
    def test_same_scores_as_one(self, data, tmp_path, quiet_hub, method):
        # No BatchNorm, whose statistics are each process' own.
        options = ["--backbone", "test_vit", "--method", method, "--pretraining-epochs", "1", "--batch-size", "13"]
        assert run(data, tmp_path, "alone", *options)[0] == 0
        answers = run_on_two_processes(on_rank, data, str(tmp_path), str(quiet_hub), options)
        assert [code for code, _ in answers] == [0, 0]
        assert answers[1][1] == "", "only the main process prints"
        assert read(tmp_path / "both")["processes"] == 2
        both, alone = (numbers(tmp_path / name) for name in ("both", "alone"))
        assert both["curves"]["training_loss"] == pytest.approx(alone["curves"]["training_loss"], rel=1e-4)
        assert both["best_epoch"] == alone["best_epoch"]
        for task, own in alone["scores"].items():
            assert both["scores"][task] == pytest.approx(own, abs=0.03), task
        if alone["relations"] is not None:
            assert torch.allclose(torch.tensor(both["relations"]), torch.tensor(alone["relations"]), rtol=1e-3)


def refused(data, out, capsys, *arguments):
    """Exit code and error text; nothing is left behind."""
    try:
        code = run(data, out, "one", *arguments)[0]
    except SystemExit as stop:
        code = stop.code
    complaint = capsys.readouterr().err
    assert "Traceback" not in complaint
    assert not (out / "one").exists()
    lines = [line for line in complaint.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert complaint.splitlines()[-1] == lines[0], "one line, and the last"
    return code, lines[0].partition("error: ")[2]


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--backbone", "resnet1"], 1, "no model 'resnet1'. Did you mean 'resnet18'"),
            (["--backbone", "saliency_resnet8"], 1, "Did you mean 'saliency_reg_resnet8'"),
            (["--pretrained"], 1, "no pretrained weights for 'saliency_reg_resnet8'"),
            (["--pretrained", "--checkpoint-path", "x"], 2, "both name weights"),
            (["--checkpoint-path", "nowhere.pth"], 1, "there is no file 'nowhere.pth'"),
            (["--backbone", "test_vit", "--image-size", "8"], 1, "8"),
            (["--drop-rate", "1"], 1, "drop_rate must be in [0, 1)"),
            (["--drop-path-rate", "0.1"], 1, "saliency_reg_resnet8 has no stochastic depth"),
            (["--train-images", "70"], 1, "70 training and 20 validation images were asked for"),
            (["--train-images", "63"], 1, "Pass a multiple of ten"),
            (["--data", "/nowhere/at/all"], 1, "found no folder /nowhere/at/all"),
            (["--labelled", "1.5"], 1, "above 0 and at most 1"),
            (["--strength", "-1"], 2, "argument --strength: found '-1'. Pass a finite number from 0 on"),
            (
                ["--method", "srdm"],
                2,
                "argument --method: found 'srdm'. Did you mean srdml? Use one of hard_sharing, single_task",
            ),
            (["--method", "hard_sharing", "--temperature", "1"], 2, "hard_sharing does not have the entropic rule"),
            (
                ["--method", "srdml_projected", "--temperature", "1"],
                2,
                "srdml_projected does not have the entropic rule",
            ),
            (["--method", "hard_sharing", "--pretraining-epochs", "1"], 2, "Use more --epochs instead"),
            (["--accumulation", "21"], 2, "Use --accumulation 20 or less"),
            (["--resume", "nowhere"], 2, "nowhere is no folder"),
        ],
    )
    def test_ends_with_one_line_and_no_folder(self, data, tmp_path, capsys, arguments, code, message):
        found, complaint = refused(data, tmp_path, capsys, *arguments)
        assert found == code
        assert message in complaint

    def test_weights_of_another_architecture(self, data, tmp_path, capsys):
        torch.save({"stem.0.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
        code, complaint = refused(data, tmp_path, capsys, "--checkpoint-path", str(tmp_path / "other.pth"))
        assert code == 1
        assert "other.pth' is no checkpoint of 'saliency_reg_resnet8'" in complaint

    def test_name_that_is_taken_and_other_options(self, finished, data, capsys):
        folder, _ = finished
        common = ("--method", "srdml_pcgrad", "--pretraining-epochs", "1")
        for arguments, message in (
            (common, "one exists in"),
            (
                (*common, "--resume", "auto", "--seed", "1"),
                "had --seed 0, but found 1. Pass the same options as before",
            ),
        ):
            with pytest.raises(SystemExit) as stop:
                run(data, folder.parent, "one", *arguments)
            assert stop.value.code == 2
            assert message in " ".join(capsys.readouterr().err.split())
