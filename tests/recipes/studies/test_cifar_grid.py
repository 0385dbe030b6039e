"""The study on CIFAR-10, run for real on a few images of their own."""

import dataclasses

import pytest

from recipes import cifar_grid
from recipes.methods.methods import METHODS
from recipes.studies.cifar_cells import train_cifar
from recipes.studies.study import Cell, Setting

from ..support.commands import call
from ..support.small_images import write_cifar
from ..support.studies import lines_of, tables_of

pytestmark = pytest.mark.usefixtures("quiet_hub")

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
    ("hard_sharing", "srdml"),
    {"weight decay": (0.0, 0.5), "strength, l1": (0.1,)},
)
COMMAND = dataclasses.replace(cifar_grid.COMMAND, settings={"tiny": SETTING})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


def study(data, results, *arguments):
    place = ("--data", data, "--results", results, "--seeds", "2", "--tuning-seeds", "1", "--workers", "1")
    return call(COMMAND.main, *place, *arguments)


def test_trains_what_is_missing_and_prints_tables(data, tmp_path):
    path = tmp_path / "study" / "results.jsonl"
    # A single value needs no trial: two of hard sharing, and two seeds of both methods.
    assert f"0 of 6 trainings are done. Results: {path}\n" in study(data, path, "--minutes", "0").out
    assert not path.exists()
    assert study(data, path, "--seeds", "1").code == 0
    first = path.read_bytes()
    both = study(data, path)
    assert both.code == 0
    assert path.read_bytes().startswith(first)
    lines = lines_of(path)
    assert len(lines) == 6
    assert "| Hard sharing | weight decay" in both.out
    assert f"6 of 6 trainings are done. Results: {path}" in both.out
    done = path.stat().st_mtime_ns
    for own in (study(data, path), study(data, path, "--minutes", "0"), study("/nowhere/at/all", path)):
        assert own.code == 0, "nothing is missing"
        assert tables_of(own.out) == tables_of(both.out)
    assert path.stat().st_mtime_ns == done
    for name in ("learning_curves", "relations_srdml"):
        assert (path.parent / f"{name}.png").exists()

    tried = {line["cell"]["value"] for line in lines if line["cell"]["method"] == "hard_sharing"}
    assert len(tried) == 2
    for line in lines:
        if line["cell"]["reported"]:
            assert line["result"]["macro"]
            assert len(line["result"]["scores"]) == 10
        else:
            assert not line["result"]["scores"], "trials see no test split"


def test_cell_is_the_same_again(data, tmp_path):
    cell = Cell(SETTING, METHODS["srdml"], 0.1, 3, reported=True)
    one, other = (train_cifar(cell, data, tmp_path / "none").to_dict() for _ in range(2))
    assert one == other


def test_other_data_are_refused(data, tmp_path):
    path = tmp_path / "results.jsonl"
    study(data, path, "--seeds", "1", "--methods", "hard_sharing")
    answer = study(write_cifar(tmp_path / "other", train=7), path)
    assert answer.code == 2
    assert "are of other data than" in answer.complaint


def test_missing_data(tmp_path):
    answer = study("/nowhere/at/all", tmp_path / "study" / "results.jsonl")
    assert answer.code == 1
    assert "cifar_grid: error: found no folder /nowhere/at/all" in answer.complaint


def test_settings_of_the_study_can_be_trained():
    for key, setting in cifar_grid.SETTINGS.items():
        assert setting.key == key
        assert set(VALUES) == set(setting.values)
        assert all(len(setting.space(METHODS[own])) == 3 for own in setting.methods), "as many values for each"
