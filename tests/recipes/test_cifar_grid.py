"""The study of CIFAR-10, run for real on a few images of its own."""

import contextlib
import dataclasses
import io
import json
import time

import pytest

from recipes import cifar_grid
from recipes.data.images.cifar import CLASSES
from recipes.methods.methods import METHODS
from recipes.studies.cifar_cells import CifarCell, build_model
from recipes.studies.study import Cell, Setting

from .small_images import write_cifar

pytestmark = pytest.mark.usefixtures("quiet_hub")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


VALUES = {
    "version": 1,
    "data": "cifar10",
    "tasks": "classes",
    "train_images": 20,
    "validation_images": 20,
    "labelled": 1.0,
    "image_size": 32,
    "backbone": "saliency_reg_resnet8",
    "activation": "gelu",
    "head_width": 8,
    "epochs": 1,
    "batch_size": 20,
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "evaluations": 1,
    "temperature": None,
}
SETTING = Setting(
    "tiny",
    "A tiny setting",
    VALUES,
    ("hard_sharing", "srdml_entropic"),
    {"weight decay": (0.0, 0.5), "strength, l1": (0.1,)},
)
COMMAND = dataclasses.replace(cifar_grid.COMMAND, settings={"tiny": SETTING})


def study(data, results, *arguments):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = COMMAND.main(
            [
                "--data",
                data,
                "--results",
                str(results),
                "--seeds",
                "2",
                "--tuning-seeds",
                "1",
                "--workers",
                "1",
                *arguments,
            ]
        )
    return code, printed.getvalue()


class TestGrid:
    def test_trains_what_is_missing_and_prints_tables(self, data, tmp_path):
        path = tmp_path / "study" / "results.jsonl"
        assert study(data, path, "--minutes", "0")[1].endswith(f"0 of 7 trainings are done. Results: {path}\n")
        assert not path.exists()
        assert study(data, path, "--seeds", "1")[0] == 0
        first = path.read_bytes()
        code, both = study(data, path)
        assert code == 0
        assert path.read_bytes().startswith(first)
        assert len(path.read_text().splitlines()) == 7
        assert "| hard sharing | weight decay" in both
        assert f"7 of 7 trainings are done. Results: {path}" in both
        done = path.stat().st_mtime_ns
        assert study(data, path) == study(data, path, "--minutes", "0") == (0, both)
        assert study("/nowhere/at/all", path) == (0, both), "nothing is missing"
        assert path.stat().st_mtime_ns == done

        lines = [json.loads(line) for line in path.read_text().splitlines()]
        tried = {line["cell"]["value"]: line["result"] for line in lines if line["cell"]["method"] == "hard_sharing"}
        reported = [line["result"] for line in lines if line["cell"]["reported"]]
        assert all(result["macro"] and len(result["scores"]) == 10 for result in reported)
        assert all(not line["result"]["scores"] for line in lines if not line["cell"]["reported"]), (
            "trials see no test split"
        )
        assert len(tried) == 2

    def test_cell_is_the_same_again(self, data):
        cell = Cell(SETTING, METHODS["srdml_entropic"], 0.1, 3, reported=True)
        one, other = (CifarCell(data)(cell)[1] for _ in range(2))
        assert one == other
        assert CifarCell(data, deadline=time.time() - 1)(cell) == (cell, None, {})

    def test_other_data_are_refused(self, data, tmp_path, capsys):
        path = tmp_path / "results.jsonl"
        study(data, path, "--seeds", "1")
        other = write_cifar(tmp_path / "other", train=7)
        with pytest.raises(SystemExit):
            study(other, path)
        assert "are of other data than" in capsys.readouterr().err

    def test_missing_data(self, tmp_path, capsys):
        code, _ = study("/nowhere/at/all", tmp_path / "study" / "results.jsonl")
        assert code == 1
        assert "cifar_grid: error: found no folder /nowhere/at/all" in capsys.readouterr().err

    def test_settings_of_the_study_can_be_trained(self):
        for key, setting in cifar_grid.SETTINGS.items():
            assert setting.key == key
            assert set(VALUES) == set(setting.values)
            assert all(setting.trials(METHODS[own]) for own in setting.methods)
        assert build_model(cifar_grid.SETTINGS["classes-500-relu"].values, CLASSES).tasks == CLASSES
