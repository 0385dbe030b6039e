"""Methods beside ours, by the same training as all others: they learn, resume, and do what their names say."""

import math
import shutil

import pytest
import torch

from recipes.data.digits import digit_splits
from recipes.methods.methods import METHODS
from recipes.models.architectures.registry import build
from recipes.models.small_networks import small_blueprint
from recipes.runtime.errors import OptionError
from recipes.training.checkpoints import Checkpoints
from recipes.training.engine import LOG
from recipes.training.options import Options
from recipes.training.train import Data, train

#: Of what each tunes, a value in the middle of its grid.
VALUES = {
    "lasso": 0.01,
    "l21": 0.1,
    "mean_regularised": 0.03,
    "mrn": 0.01,
    "mtrl": 0.01,
    "rep_mtl": 0.1,
    "soft_sharing": 0.01,
}
PARTS = ("head_penalty", "rep_mtl", "gradnorm", "loss_weighting", "by_relations")
FIELD = [
    key
    for key, method in METHODS.items()
    if any(getattr(method, part) for part in (*PARTS, "frozen"))
    or method.architecture not in ("hard_sharing", "single_task")
]
#: One of ten classes: all pairs of labels are alike.
FIELD.remove("branch_label_correlation")
OF_TORCHJD = ["torchjd:UPGrad", "torchjd:IMTLG@parameters", "torchjd:DWA", "torchjd:IMTLL", "torchjd:FAMO"]


def value_of(method):
    return method.fixed or VALUES.get(method.key.removesuffix("_frozen"), 0.01)


def trained(key, *, epochs=6, folder=None, resume="never", value=None, test=True, **options):
    splits = digit_splits(0, 20, 20)
    blueprint = small_blueprint(splits.tasks, "gelu")
    method = METHODS[key]
    return train(
        lambda: build(method.architecture, blueprint),
        Data(splits.kinds, splits.train, splits.validation, splits.test if test else None),
        method,
        value_of(method) if value is None else value,
        Options(epochs=epochs, batch_size=20, learning_rate=5e-3, evaluations=epochs, weight_decay=0.01, **options),
        folder=folder,
        resume=resume,
    )


def states_of(outcome):
    return {name: value.clone() for name, value in outcome.model.state_dict().items()}


class TestEach:
    @pytest.mark.parametrize("key", [*FIELD, "mgda_ub", "mgda_ub_unit"])
    def test_beats_the_constant_predictor_by_far(self, key):
        # In 60 steps some have hardly begun.
        assert trained(key).macro["auc"] > (0.65 if key in ("merged_single_task", "mgda_ub", "ple") else 0.8)

    @pytest.mark.parametrize("key", [*(key for key in FIELD if not METHODS[key].frozen), "lasso_frozen", *OF_TORCHJD])
    def test_goes_on_as_if_it_had_not_been_stopped(self, key, tmp_path):
        options = {"epochs": 2, "checkpoint_steps": 7, "keep_checkpoints": 9, "test": False}
        whole = trained(key, folder=tmp_path / "whole", **options)
        (_, second, *_) = sorted(Checkpoints(tmp_path / "whole", 9).folder.glob("checkpoint-*"))
        shutil.copytree(second, tmp_path / "part" / second.name)
        shutil.copy(tmp_path / "whole" / LOG, tmp_path / "part")
        resumed = trained(key, folder=tmp_path / "part", resume="auto", **options)
        one, other = states_of(whole), states_of(resumed)
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert whole.to_dict() == resumed.to_dict()


class TestParts:
    def test_frozen_features_are_those_of_trained_hard_sharing(self):
        base = trained("hard_sharing", epochs=2, value=0.01, test=False).model
        frozen = trained("lasso_frozen", epochs=2, test=False).model.backbone
        for name, value in base.backbone.state_dict().items():
            assert torch.equal(value, frozen.backbone.state_dict()[name]), name
        features = frozen(digit_splits(0, 20, 20).train.inputs)
        assert torch.allclose(features.mean(0), torch.zeros(()), atol=1e-5)
        spread = features.std(0, correction=0)
        assert bool((torch.isclose(spread, torch.ones(()), atol=1e-3) | (spread == 0)).all())

    def test_sparse_penalties_make_zeros_and_others_none(self):
        for key, value, zeros in (
            ("lasso", 0.3, 1),
            ("lasso_frozen", 0.3, 1),
            ("l21_frozen", 30.0, 1),
            ("mtrl", 0.3, 0),
        ):
            heads = trained(key, epochs=3, value=value, test=False).model.heads
            first = torch.cat([head.get_submodule("1").weight.flatten() for head in heads])
            assert bool((first == 0).any()) is bool(zeros), key

    def test_strength_zero_is_hard_sharing(self):
        plain = states_of(trained("hard_sharing", epochs=2, value=0.0, test=False))
        for key in ("lasso", "l21", "mean_regularised", "mrn", "mtrl", "rep_mtl"):
            # The weights that are penalised have no weight decay: here nothing has.
            own = train_without_decay(key)
            assert all(torch.allclose(plain[name], own[name], atol=1e-6) for name in plain), key

    def test_merged_is_never_worse_on_validation_than_the_mean_of_the_weights(self):
        outcome = trained("merged_single_task", epochs=2, test=False)
        assert math.isfinite(outcome.validation)
        assert outcome.model.backbone is not None

    @pytest.mark.parametrize("key", ["uncertainty", "torchjd:FAMO"])
    def test_losses_are_weighed_in_whole_steps(self, key):
        with pytest.raises(OptionError, match="2 micro-batch"):
            trained(key, epochs=1, accumulation=2)

    @pytest.mark.parametrize(("key", "match"), [("torchjd:UPGard", "no weighting"), ("torchjd:ConFIG", "ConFIG")])
    def test_what_torchjd_does_not_have_is_told(self, key, match):
        with pytest.raises(OptionError, match=match):
            METHODS[key]


def train_without_decay(key):
    splits = digit_splits(0, 20, 20)
    blueprint = small_blueprint(splits.tasks, "gelu")
    data = Data(splits.kinds, splits.train, splits.validation, None)
    options = Options(epochs=2, batch_size=20, learning_rate=5e-3, evaluations=2, weight_decay=0.0)
    return states_of(train(lambda: build("hard_sharing", blueprint), data, METHODS[key], 0.0, options))
