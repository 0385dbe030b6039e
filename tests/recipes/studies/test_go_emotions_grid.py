"""The study on GoEmotions, on small generated files of its schema."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from recipes import go_emotions_grid
from recipes.data.texts.emotions import HUB_ID
from recipes.methods.methods import METHODS
from recipes.studies.emotion_cells import train_emotions
from recipes.studies.study import Cell

from ..support.commands import call
from ..support.emotion_texts import rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emotions")
    for seed, (name, number) in enumerate({"train": 120, "validation": 40}.items()):
        rows(number, seed, f"{name} ").to_parquet(folder / f"{name}.parquet")
    return folder


def test_a_cell(data: Path, tmp_path: Path) -> None:
    setting = go_emotions_grid.SETTINGS["all-labels"]
    small = {"train_texts": 60, "validation_texts": 20, "epochs": 1, "width": 16, "vocabulary": 80, "warmup_steps": 0}
    setting = dataclasses.replace(setting, values={**setting.values, **small})
    trial, report = (
        train_emotions(Cell(setting, METHODS["srdml"], 0.01, 0, reported), str(data), tmp_path).to_dict()
        for reported in (False, True)
    )
    assert trial["scores"] == {}
    assert trial["validation"] == report["validation"]
    assert {"f1", "auc", "f1_rare", "auc_rare"} <= set(report["macro"])


def test_the_tables_say_what_is_not_done(tmp_path: Path) -> None:
    answer = call(go_emotions_grid.main, "--minutes", "0", "--results", tmp_path / "results.jsonl")
    assert answer.code == 0
    assert "8,000 training texts, 90 % of the labels removed" in answer.out
    assert "F1 of rare tasks %" in answer.out
    assert "0 of " in answer.out
    assert HUB_ID in go_emotions_grid.COMMAND.data


def test_a_metric_without_a_grid_of_its_own_tries_the_strengths_of_l1() -> None:
    setting = go_emotions_grid.SETTINGS["all-labels"]
    assert setting.space(METHODS["srdml_cosine"]) == setting.space(METHODS["srdml"]) == (0.001, 0.003, 0.01)
    assert setting.space(METHODS["srdml_sqchordal"]) == (0.01, 0.03, 0.1)
