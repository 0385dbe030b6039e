"""Trainings of all methods on tasks of every kind with missing labels."""

import math

import pytest
import torch
from torch import nn

from recipes.methods.methods import METHODS
from recipes.runtime.errors import OptionError
from recipes.training.best_weights import BestWeights
from recipes.training.options import Options
from recipes.training.train import Data, train

from ..support.mixed_tasks import (
    ALL_BINARY,
    KINDS,
    MIXED,
    NAN,
    RATE,
    SAMPLES,
    drawn,
    examples,
    net,
    same_weights,
    slow_total,
    trained,
)

SHARED = [
    key
    for key, method in METHODS.items()
    if method.architecture == "hard_sharing" and method.tuned and not method.frozen
]


class TestStep:
    @pytest.mark.parametrize("accumulation", [1, 4])
    @KINDS
    def test_with_missing_labels_is_that_of_a_loop(self, kinds, accumulation):
        inputs, labels = drawn(kinds)
        model = net(kinds)
        slow_total(model, kinds, inputs, labels).backward()
        ours = trained(kinds, inputs, labels, accumulation=accumulation)
        assert ours.best_epoch == 1
        for (name, before), after in zip(model.named_parameters(), ours.model.parameters()):
            assert torch.allclose(before - RATE * before.grad, after, rtol=1e-10, atol=1e-12), name
        assert ours.curves["training_loss"][0] == pytest.approx(
            slow_total(net(kinds), kinds, inputs, labels).item() / 3
        )

    @KINDS
    def test_micro_batches_without_missing_labels_count(self, kinds):
        inputs, labels = drawn(kinds, missing=-1.0)
        one, other = (trained(kinds, inputs, labels, accumulation=count).model for count in (1, SAMPLES))
        for name, weight in one.named_parameters():
            assert torch.allclose(weight, other.get_parameter(name), rtol=1e-10, atol=1e-12), name

    def test_sample_without_labels_counts_for_the_saliency_alone(self):
        inputs, labels = drawn(ALL_BINARY)
        others = inputs.clone()
        others[0] += 1.0
        for key, alike in (("hard_sharing", True), ("srdml_uniform", False), ("srdml", False)):
            one, other = (trained(ALL_BINARY, own, labels, key, 5.0) for own in (inputs, others))
            assert same_weights(one.model, other.model) is alike, key

    def test_task_without_any_label_is_left_alone(self):
        inputs, labels = drawn(ALL_BINARY)
        labels[:, 1] = NAN
        before = net(ALL_BINARY)
        ours = trained(ALL_BINARY, inputs, labels)
        assert same_weights(ours.model.heads["two"], before.heads["two"])
        assert not same_weights(ours.model.heads["one"], before.heads["one"])
        assert math.isfinite(ours.curves["training_loss"][0])


class TestMethods:
    def test_each_trains_otherwise(self):
        inputs, labels = drawn(ALL_BINARY, 30)
        models = {key: trained(ALL_BINARY, inputs, labels, key, 3.0, epochs=3, batch_size=10).model for key in SHARED}
        keys = list(models)
        for index, key in enumerate(keys):
            for other in keys[:index]:
                assert not same_weights(models[key], models[other]), f"{key} is {other}"

    def test_strength_zero_is_the_method_without_a_penalty(self):
        inputs, labels = drawn(MIXED, 30)
        for key, method in METHODS.items():
            if method.rule is not None and method.tuned:
                surgery = [key for key, own in METHODS.items() if own.surgery is method.surgery and own.rule is None]
                plain = surgery[0] if method.surgery is not None else "hard_sharing"
                one, other = (trained(MIXED, inputs, labels, own, epochs=2, batch_size=7) for own in (key, plain))
                assert same_weights(one.model, other.model), key
                assert one.scores == other.scores

    def test_leaves_nothing_attached_and_says_what_it_learned(self):
        inputs, labels = drawn(MIXED, 30)
        ours = trained(MIXED, inputs, labels, "srdml+pcgrad", 0.5, epochs=4, evaluations=2, batch_size=7)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.model.modules())
        relations = torch.tensor(ours.relations)
        assert torch.equal(relations, relations.T)
        assert relations.triu(1).sum() == pytest.approx(1.0)
        assert ours.curves["epoch"] == [2.0, 4.0]
        assert set(ours.curves) == {
            "epoch",
            "training_loss",
            "validation_loss",
            "validation_score",
            "penalty_share",
            "conflicts",
        }
        assert all(share > 0 for share in ours.curves["penalty_share"])
        best = ours.curves["epoch"].index(ours.best_epoch)
        assert ours.validation == max(ours.curves["validation_score"]) == ours.curves["validation_score"][best]
        assert trained(MIXED, inputs, labels).relations is None

    @pytest.mark.parametrize(("key", "options"), [("srdml", {"penalty": "share"}), ("srdml_default", {})])
    def test_share_sets_in_when_the_strength_is_found(self, key, options):
        inputs, labels = drawn(ALL_BINARY)
        curves = trained(ALL_BINARY, inputs, labels, key, 0.5, epochs=20, evaluations=20, **options).curves
        assert curves["penalty_share"][:10] == [0.0] * 10
        assert curves["penalty_share"][10] == pytest.approx(0.5, rel=0.3)
        assert min(curves["penalty_share"][10:]) > 0.0

    def test_temperature_is_of_the_entropic_rule(self):
        inputs, labels = drawn(ALL_BINARY, 30)
        spread = []
        for temperature in (100.0, 0.01):
            found = trained(ALL_BINARY, inputs, labels, "srdml", 0.5, epochs=3, temperature=temperature)
            spread.append(max(map(max, found.relations)))
        assert spread[0] == pytest.approx(1 / 3, rel=0.01), "of three pairs"
        assert spread[1] > 0.5


class TestPretraining:
    def test_is_hard_sharing_whose_best_weights_the_method_starts_with(self):
        inputs, labels = drawn(MIXED, 30)
        common = {"epochs": 3, "batch_size": 7}
        base = trained(MIXED, inputs, labels, **common).model
        one = trained(MIXED, inputs, labels, "srdml", 0.5, pretraining_epochs=3, **common)
        other = trained(MIXED, inputs, labels, "srdml", 0.5, model=base, **common)
        assert same_weights(one.model, other.model)
        assert one.to_dict() == other.to_dict()

    def test_checkpoints_of_it_are_apart(self, tmp_path):
        inputs, labels = drawn(MIXED, 30)
        common = {"epochs": 2, "batch_size": 7, "checkpoint_steps": 1}
        one = trained(MIXED, inputs, labels, "pcgrad", folder=tmp_path, pretraining_epochs=1, **common)
        assert (tmp_path / "pretraining" / "log.jsonl").exists()
        again = trained(MIXED, inputs, labels, "pcgrad", folder=tmp_path, resume="auto", pretraining_epochs=1, **common)
        assert again.to_dict() == one.to_dict()


class Apart(nn.Module):
    """A network of its own for every task."""

    def __init__(self, kinds):
        super().__init__()
        self.networks = nn.ModuleDict(
            {task: net({task: kind}, seed) for seed, (task, kind) in enumerate(kinds.items())}
        )

    def forward(self, inputs):
        return {task: own(inputs)[task] for task, own in self.networks.items()}

    def parts(self):
        return [([task], own) for task, own in self.networks.items()]


class TestSingleTask:
    def test_one_network_for_all_is_refused(self):
        inputs, labels = drawn(MIXED)
        with pytest.raises(
            OptionError, match="single_task needs a network for each task, and the model Net is one for all"
        ):
            trained(MIXED, inputs, labels, "single_task")

    def test_each_task_has_the_best_epoch_of_its_own(self):
        inputs, labels = drawn(MIXED, 40)
        options = {"epochs": 6, "evaluations": 6, "batch_size": 7, "learning_rate": 0.5, "model": Apart(MIXED)}
        together = trained(MIXED, inputs, labels, "single_task", **options)
        for column, (task, kind) in enumerate(MIXED.items()):
            own = labels.clone()
            own[:, [other for other in range(3) if other != column]] = NAN
            alone = trained(MIXED, inputs, own, "single_task", **options)
            assert alone.best_epochs[task] == together.best_epochs[task]
            assert alone.scores[task] == together.scores[task], kind
        assert together.best_epoch == max(together.best_epochs.values())
        assert together.relations is None


class TestHonesty:
    def test_without_a_test_split_nothing_is_measured_on_it(self):
        inputs, labels = drawn(MIXED, 30)
        trial, report = (
            trained(MIXED, inputs, labels, "srdml", 0.3, epochs=2, batch_size=7, tested=tested)
            for tested in (False, True)
        )
        assert trial.scores == trial.macro == trial.outputs == trial.validation_outputs == {}
        assert report.scores
        assert (trial.validation, trial.curves, trial.relations) == (report.validation, report.curves, report.relations)
        assert same_weights(trial.model, report.model)

    def test_ties_go_to_the_lower_loss_and_then_to_the_first(self):
        best = BestWeights([net(MIXED)], (-math.inf, -math.inf))
        for epoch, score in enumerate([(0.5, -0.2), (0.5, -0.1), (0.5, -0.1), (0.4, -0.0), (NAN, 0.0), (0.5, NAN)], 1):
            best.update(epoch, [score])
        assert best.epochs == [2]
        assert best.scores == [(0.5, -0.1)]

    def test_best_weights_are_copies_and_come_back(self):
        model = net(MIXED)
        best = BestWeights([model], (-math.inf,))
        for epoch, score in ((1, 0.5), (2, 0.7), (3, 0.6)):
            model.backbone[0].bias.data.fill_(epoch)
            best.update(epoch, [(score,)])
        best.restore()
        assert model.backbone[0].bias.tolist() == [2.0] * 8
        other = BestWeights([net(MIXED, seed=1)], (-math.inf,))
        other.load_state_dict(best.state_dict())
        assert (other.epochs, other.scores) == ([2], [(0.7,)])

    def test_random_state_of_the_caller_is_left_alone(self):
        inputs, labels = drawn(MIXED, 30)
        before = torch.get_rng_state()
        trained(MIXED, inputs, labels, "srdml", 0.1)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("key", ["pcgrad", "srdml+pcgrad@parameters"])
    def test_same_seed_same_numbers(self, key):
        inputs, labels = drawn(ALL_BINARY, 30)
        one, same, other = (
            trained(ALL_BINARY, inputs, labels, key, 0.1, epochs=2, batch_size=7, seed=seed) for seed in (3, 3, 4)
        )
        assert one.to_dict() == same.to_dict()
        assert one.to_dict() != other.to_dict()


class TestBadOptions:
    def test_evaluations(self):
        with pytest.raises(OptionError, match="evaluations must be a whole number from 1 on; found 0"):
            train(
                lambda: net(MIXED),
                Data(MIXED, examples(*drawn(MIXED)), examples(*drawn(MIXED)), None),
                METHODS["hard_sharing"],
                0.0,
                Options(epochs=1, batch_size=5, learning_rate=0.1, evaluations=0),
            )

    def test_outputs_that_are_never_finite_keep_the_first_weights(self):
        inputs, labels = drawn(MIXED, 30)
        before = net(MIXED)
        ours = trained(MIXED, inputs, labels, learning_rate=1e200, epochs=2, batch_size=7)
        assert (ours.best_epoch, ours.validation) == (0, -math.inf)
        assert same_weights(ours.model, before)
