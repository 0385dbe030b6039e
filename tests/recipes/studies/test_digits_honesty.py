"""What a fair comparison on the digits rests on, seen in real trainings."""

import math
import pickle

import pytest
import torch

from recipes.data.digits import digit_splits
from recipes.methods.methods import METHODS
from recipes.studies import digit_cells
from recipes.studies.digit_cells import train_digits
from recipes.studies.study import Cell, Setting

VALUES = {
    "train_per_class": 3,
    "validation_per_class": 3,
    "epochs": 3,
    "evaluations": 3,
    "batch_size": 10,
    "learning_rate": 5e-3,
    "activation": "gelu",
    "temperature": None,
    "dtype": "float32",
    "accumulation": 1,
    "mixed_precision": "no",
    "clip_norm": None,
    "decay": "constant",
    "weight_decay": 0.0,
}
OF_THE_RUN = {"checkpoint_steps": 0, "data_workers": 0, "trackers": ()}
RULES = ("srdml_uniform", "srdml_projected", "srdml", "srdml_authors", "srdml_cosine", "srdml_sqchordal")


@pytest.fixture
def trained(tmp_path):
    """Trains one cell in this process."""

    def train(key, value=0.0, seed=0, reported=True, **values):
        cell = Cell(Setting("digits", "Digits", {**VALUES, **values}, (key,)), METHODS[key], value, seed, reported)
        return train_digits(cell, OF_THE_RUN, tmp_path / "none")

    return train


def test_strength_zero_is_hard_sharing(trained):
    plain = trained("hard_sharing")
    for key in RULES:
        ours = trained(key)
        assert ours.scores == plain.scores
        for name, curve in plain.curves.items():
            assert ours.curves[name] == curve, key
    assert trained("srdml_projected", 1.0).curves["validation_loss"] != plain.curves["validation_loss"]


def test_surgery_acts(trained):
    """Every kind gives another model than hard sharing and than the others, from the same seed."""
    keys = ("hard_sharing", "pcgrad", "pcgrad@parameters", "mgda_ub", "mgda_ub_unit")
    losses = [trained(key).curves["validation_loss"] for key in keys]
    for index, one in enumerate(losses):
        assert one not in losses[:index], keys[index]


@pytest.mark.parametrize("surgery", ["pcgrad", "pcgrad@parameters"])
def test_srdml_with_surgery_at_strength_zero_is_that_surgery(trained, surgery):
    plain, ours, other = (
        trained(key, value) for key, value in ((surgery, 0.0), (f"srdml+{surgery}", 0.0), (f"srdml+{surgery}", 1.0))
    )
    assert ours.scores == plain.scores
    for name, curve in plain.curves.items():
        assert ours.curves[name] == curve
    assert other.curves["validation_loss"] != plain.curves["validation_loss"]


@pytest.mark.parametrize("key", ["single_task", "pcgrad", "mgda_ub", "srdml+pcgrad@parameters"])
def test_same_seed_same_numbers(trained, key):
    one, same, other = (trained(key, 0.1, seed=seed).to_dict() for seed in (3, 3, 4))
    assert one == same
    assert one != other


def test_conflicts_are_measured_alike_for_all_that_share(trained):
    for key, method in METHODS.items():
        if method.architecture not in ("hard_sharing", "single_task"):
            continue  # which this recipe cannot build
        if method.by_relations:
            continue  # which need an epoch to find them in
        curves = trained(key, 0.0 if method.tuned else 0.1, epochs=1, evaluations=1).curves
        assert ("conflicts" in curves) == method.shared
        assert all(0 <= share <= 1 for share in curves.get("conflicts", ()))


def test_trials_never_see_the_test_images(trained, monkeypatch):
    def without_test(*arguments):
        splits = digit_splits(*arguments)
        splits.test.inputs.fill_(math.nan)
        return splits

    one = trained("srdml", 0.1, reported=False)
    monkeypatch.setattr(digit_cells, "digit_splits", without_test)
    other = trained("srdml", 0.1, reported=False)
    assert one.scores == one.macro == {}
    assert 0 < one.validation < 1
    assert one.to_dict() == other.to_dict()
    report = trained("srdml", 0.1)
    assert report.validation == one.validation, "also what is reported is chosen on validation alone"
    assert math.isnan(report.macro["auc"])


def test_single_tasks_share_nothing(trained, monkeypatch):
    """Each network is the same as if its task were alone: other labels do not reach it, nor its best epoch."""

    def other_labels(*arguments):
        splits = digit_splits(*arguments)
        for part in (splits.train, splits.validation):
            part.labels[:, 1:] = part.labels[:, 1:].flip(1)
        return splits

    ours = trained("single_task")
    monkeypatch.setattr(digit_cells, "digit_splits", other_labels)
    theirs = trained("single_task")
    assert ours.scores["0"] == theirs.scores["0"]
    assert ours.best_epochs["0"] == theirs.best_epochs["0"]
    # Five keeps its own: it is in the middle.
    others = [str(digit) for digit in range(1, 10) if digit != 5]
    assert all(ours.scores[digit]["auc"] != theirs.scores[digit]["auc"] for digit in others)


def test_best_epoch_is_the_one_of_the_highest_validation_auc(trained):
    # A large learning rate makes the scores go up and down.
    ours = trained("hard_sharing", epochs=6, evaluations=6, learning_rate=0.05)
    scores, losses = ours.curves["validation_score"], ours.curves["validation_loss"]
    assert ours.validation == pytest.approx(max(scores))
    best = ours.best_epoch - 1
    assert set(ours.best_epochs.values()) == {best + 1}
    assert (scores[best], -losses[best]) == max(zip(scores, (-loss for loss in losses)))
    assert ours.validation_loss == pytest.approx(losses[best])


def test_training_that_diverges_is_recorded(trained):
    ours = trained("hard_sharing", epochs=1, learning_rate=1e30)
    assert ours.best_epochs == {str(digit): 0 for digit in range(10)}
    assert ours.validation == -math.inf
    assert set(ours.scores) == set(ours.best_epochs), "the initial weights are measured"


def test_random_state_is_left_alone(trained):
    before = torch.get_rng_state()
    trained("hard_sharing", epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_cells_reach_other_processes():
    for method in METHODS.values():
        cell = Cell(Setting("digits", "Digits", VALUES, (method.key,)), method, 0.1, 0, True)
        train, same = pickle.loads(pickle.dumps((train_digits, cell)))
        assert same == cell
        assert train is train_digits
