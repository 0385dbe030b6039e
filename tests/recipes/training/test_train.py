"""Tasks of any kind with missing labels: losses, scores, and trainings of all methods."""

import copy
import math

import pytest
import torch
from sklearn import metrics
from torch import nn
from torch.nn import functional

from recipes.data.digits import Examples
from recipes.data.task_kinds import BINARY, TaskKind, columns_of
from recipes.methods.methods import METHODS
from recipes.runtime.errors import DataError, OptionError
from recipes.training.loss_sums import weighted_sums
from recipes.training.metrics import METRICS_OF, macro, score_of, task_scores
from recipes.training.objective import MultiTaskObjective
from recipes.training.train import Data, Options, train_tasks

NAN = math.nan
MIXED = {"yes": BINARY, "which": TaskKind("classes", 3), "much": TaskKind("number", mean=2.0, spread=3.0)}
ALL_BINARY = dict.fromkeys(("one", "two", "three"), BINARY)
KINDS = pytest.mark.parametrize("kinds", [MIXED, ALL_BINARY], ids=["mixed", "binary"])
SAMPLES, RATE = 14, 0.05


class Net(nn.Module):
    def __init__(self, kinds, dtype=torch.float64):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.heads = nn.ModuleDict({task: head(kind.classes) for task, kind in kinds.items()})
        self.to(dtype)

    def forward(self, inputs):
        feature = self.backbone(inputs)
        return {task: head(feature) for task, head in self.heads.items()}


def head(classes):
    last = nn.Flatten(0) if classes == 1 else nn.Identity()
    return nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, classes), last)


def drawn(kinds, count=SAMPLES, missing=0.4, seed=0, dtype=torch.float64):
    """Inputs and labels; the first sample has no label at all, and the second one has all."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator, dtype=dtype)
    columns = []
    for column, kind in enumerate(kinds.values()):
        if kind.name == "number":
            columns.append(4 * inputs[:, 0] + 1)
        else:
            columns.append((inputs[:, column] > 0).to(dtype) * max(kind.classes - 1, 1))
    labels = torch.stack(columns, dim=1)
    hidden = torch.rand(labels.shape, generator=generator) < missing
    hidden[0], hidden[1] = True, False
    return inputs, torch.where(hidden, NAN, labels)


def slow_loss(kind, output, label):
    """Of one sample, from the definitions."""
    if kind.name == "binary":
        chance = torch.sigmoid(output)
        return -torch.log(chance if label == 1 else 1 - chance)
    if kind.name == "classes":
        return -torch.log(output.exp()[int(label)] / output.exp().sum())
    return ((output * kind.spread + kind.mean - label) / kind.spread) ** 2


def slow_total(model, kinds, inputs, labels):
    """Sum over the tasks of the mean loss over the samples with a label."""
    total = torch.zeros((), dtype=inputs.dtype)
    for column, (task, kind) in enumerate(kinds.items()):
        known = [row for row in range(len(inputs)) if not math.isnan(labels[row, column])]
        losses = [slow_loss(kind, model(inputs[row : row + 1])[task][0], labels[row, column]) for row in known]
        if losses:
            total = total + sum(losses) / len(losses)
    return total


def net(kinds, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return Net(kinds, dtype)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


class TestKinds:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("text",), "Use one of binary, classes, number"),
            (("classes", 1), "Use 2 or more for 'classes'"),
            (("binary", 2), "Use 2 or more for 'classes', and 1 for the others"),
            (("number", 1, 0.0, 0.0), "the latter two above 0"),
            (("number", 1, NAN, 1.0), "must be finite"),
        ],
    )
    def test_wrong_ones_are_refused(self, arguments, message):
        with pytest.raises(DataError, match=message):
            TaskKind(*arguments)

    def test_outputs_are_side_by_side(self):
        assert columns_of(MIXED) == columns_of(list(MIXED.values())) == [slice(0, 1), slice(1, 4), slice(4, 5)]


class TestObjective:
    @KINDS
    def test_losses_and_weights_are_those_of_a_loop(self, kinds):
        model, (inputs, labels) = net(kinds), drawn(kinds)
        objective = MultiTaskObjective(kinds)
        losses = objective.losses(model, (inputs, labels))
        weights = objective.weights((inputs, labels))
        assert torch.equal(weights.bool(), ~torch.isnan(labels).T)
        for column, (task, kind) in enumerate(kinds.items()):
            assert losses[column].shape == (SAMPLES,)
            assert torch.isfinite(losses[column]).all(), "also without a label"
            for row in range(SAMPLES):
                if not math.isnan(labels[row, column]):
                    expected = slow_loss(kind, model(inputs)[task][row], labels[row, column])
                    assert losses[column][row].item() == pytest.approx(expected.item(), rel=1e-12)

    def test_weights_of_every_batch_are_of_the_same_kind(self):
        """Of a step, some micro-batches and processes may have all labels, and others not."""
        inputs, labels = drawn(MIXED, missing=-1.0)
        for batch in ((inputs, labels), (inputs[1:], labels[1:]), (inputs[:0], labels[:0])):
            weights = MultiTaskObjective(MIXED).weights(batch)
            assert torch.equal(weights, (~torch.isnan(batch[1])).T.float())

    @KINDS
    def test_gradients_do_not_depend_on_whether_graphs_are_apart(self, kinds):
        inputs, labels = drawn(kinds)
        found = []
        for apart in (False, True):
            model, objective = net(kinds), MultiTaskObjective(kinds, apart=apart)
            losses = objective.losses(model, (inputs, labels))
            sum(weighted_sums(losses, objective.weights((inputs, labels)))).backward()
            found.append([loss.detach() for loss in losses] + [weight.grad for weight in model.parameters()])
        for one, other in zip(*found):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("apart", [False, True])
    @KINDS
    def test_a_batch_without_samples(self, kinds, apart):
        model, objective = net(kinds), MultiTaskObjective(kinds, apart=apart)
        inputs, labels = drawn(kinds)
        batch = inputs[:0], labels[:0]
        losses = objective.losses(model, batch)
        assert [tuple(loss.shape) for loss in losses] == [(0,)] * 3
        assert objective.regularizer_arguments(batch, losses) == {}

    def test_share_is_of_the_means_over_known_labels(self):
        model, batch = net(MIXED), drawn(MIXED)
        objective = MultiTaskObjective(MIXED)
        given = objective.regularizer_arguments(batch, objective.losses(model, batch))
        assert given["losses"].item() == pytest.approx(slow_total(model, MIXED, *batch).item(), rel=1e-12)
        assert not given["losses"].requires_grad

    def test_predictions_are_in_the_order_of_the_columns(self):
        model, (inputs, labels) = net(MIXED), drawn(MIXED)
        found = MultiTaskObjective(MIXED).predictions(model, (inputs, labels))
        assert found["outputs"].shape == (SAMPLES, 5)
        for task, columns in zip(MIXED, columns_of(MIXED)):
            expected = model(inputs)[task].reshape(SAMPLES, -1).float()
            assert torch.equal(found["outputs"][:, columns], expected)
        assert found["labels"] is labels


def examples(inputs, labels):
    return Examples(inputs, labels, tuple(range(len(inputs))))


def trained(kinds, inputs, labels, key="hard_sharing", value=0.0, model=None, **options):
    """One training with plain gradient descent, without anything random."""
    options = {
        "epochs": 1,
        "batch_size": len(inputs),
        "learning_rate": RATE,
        "decay": "constant",
        "evaluations": 1,
        **options,
    }
    held_out = examples(*drawn(kinds, 20, 0.2, seed=5, dtype=inputs.dtype))
    return train_tasks(
        lambda: net(kinds, dtype=inputs.dtype) if model is None else copy.deepcopy(model),
        Data(kinds, examples(inputs, labels), held_out, held_out),
        METHODS[key],
        value,
        Options(**options),
        seed=3,
        make_optimizer=lambda model, rate, decay: torch.optim.SGD(model.parameters(), lr=rate),
    )


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
        for key, alike in (("hard_sharing", True), ("uniform", False), ("srdml_entropic", False)):
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


class TestScores:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_are_those_of_scikit_learn(self, seed):
        torch.manual_seed(seed)
        labels = drawn(MIXED, 60, seed=seed)[1]
        outputs = torch.randn(60, 5).round(decimals=1)  # with ties
        found = task_scores(outputs, labels, MIXED)
        known = ~torch.isnan(labels)
        truth, said = labels[known[:, 0], 0].numpy(), outputs[known[:, 0], 0].numpy()
        yes = said > 0
        expected = {
            "accuracy": metrics.accuracy_score(truth, yes),
            "auc": metrics.roc_auc_score(truth, said),
            "precision": metrics.precision_score(truth, yes),
            "recall": metrics.recall_score(truth, yes),
        }
        assert found["yes"] == pytest.approx(expected)
        rows = known[:, 1]
        accuracy = metrics.accuracy_score(labels[rows, 1].numpy(), outputs[rows, 1:4].argmax(1).numpy())
        assert found["which"] == {"accuracy": pytest.approx(accuracy)}
        rows = known[:, 2]
        predicted = outputs[rows, 4] * 3.0 + 2.0
        nmse = metrics.mean_squared_error(labels[rows, 2].numpy(), predicted.numpy()) / 9.0
        assert found["much"] == pytest.approx({"nmse": nmse}, rel=1e-5)
        chosen_by = (expected["auc"] + accuracy + 1 - nmse) / 3
        assert score_of(outputs, labels, MIXED) == pytest.approx(chosen_by, rel=1e-5)

    def test_constant_labels(self):
        outputs = torch.tensor([[1.0], [-1.0], [2.0]])
        one = {"only": BINARY}
        yes = task_scores(outputs, torch.ones(3, 1), one)["only"]
        assert math.isnan(yes.pop("auc"))
        assert yes == pytest.approx({"accuracy": 2 / 3, "precision": 1.0, "recall": 2 / 3})
        no = task_scores(outputs, torch.zeros(3, 1), one)["only"]
        assert math.isnan(no["auc"])
        assert math.isnan(no["recall"])
        assert no["accuracy"] == pytest.approx(1 / 3)
        assert no["precision"] == 0.0
        assert task_scores(-outputs.abs(), torch.tensor([[1.0], [0.0], [1.0]]), one)["only"]["precision"] == 0.0

    def test_without_labels_or_with_outputs_that_are_not_finite(self):
        outputs, labels = torch.randn(6, 5), drawn(MIXED, 6, missing=-1.0)[1]
        none = task_scores(outputs, torch.full((6, 3), NAN), MIXED)
        assert {task: tuple(own) for task, own in none.items()} == {t: METRICS_OF[k.name] for t, k in MIXED.items()}
        assert all(math.isnan(value) for own in none.values() for value in own.values())
        outputs[3, 2] = math.inf
        broken = task_scores(outputs, labels, MIXED)
        # All of them: a mean over the tasks that are left would flatter the method.
        assert all(math.isnan(value) for own in broken.values() for value in own.values())
        assert score_of(outputs, labels, MIXED) == -math.inf
        assert score_of(torch.randn(6, 5), torch.full((6, 3), NAN), MIXED) == -math.inf

    def test_macro_leaves_out_what_has_no_value(self):
        found = macro({"a": {"auc": 0.5, "accuracy": 1.0}, "b": {"auc": NAN, "accuracy": 0.0}, "c": {"nmse": NAN}})
        assert math.isnan(found.pop("nmse"))
        assert found == {"auc": 0.5, "accuracy": 0.5}


class TestMethods:
    def test_each_trains_otherwise(self):
        inputs, labels = drawn(ALL_BINARY, 30)
        models = {key: trained(ALL_BINARY, inputs, labels, key, 3.0, epochs=3, batch_size=10).model for key in METHODS}
        keys = list(models)
        for index, key in enumerate(keys):
            for other in keys[:index]:
                assert not same_weights(models[key], models[other]), f"{key} is {other}"

    def test_strength_zero_is_the_method_without_a_penalty(self):
        inputs, labels = drawn(MIXED, 30)
        for key, method in METHODS.items():
            if method.rule is not None:
                plain = "hard_sharing" if method.surgery is None else "pcgrad"
                one, other = (trained(MIXED, inputs, labels, own, epochs=2, batch_size=7) for own in (key, plain))
                assert same_weights(one.model, other.model), key
                assert one.scores == other.scores

    def test_leaves_nothing_attached_and_says_what_it_learned(self):
        inputs, labels = drawn(MIXED, 30)
        ours = trained(MIXED, inputs, labels, "srdml_pcgrad", 0.5, epochs=4, evaluations=2, batch_size=7)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.model.modules())
        relations = torch.tensor(ours.relations)
        assert torch.equal(relations, relations.T)
        assert relations.triu(1).sum() == pytest.approx(1.0)
        assert ours.curves["epoch"] == [2.0, 4.0]
        assert set(ours.curves) == {"epoch", "training_loss", "validation_score", "penalty_share", "conflicts"}
        assert all(share > 0 for share in ours.curves["penalty_share"])
        best = ours.curves["epoch"].index(ours.best_epoch)
        assert ours.validation == max(ours.curves["validation_score"]) == ours.curves["validation_score"][best]
        assert trained(MIXED, inputs, labels).relations is None

    def test_temperature_is_of_the_entropic_rule(self):
        inputs, labels = drawn(ALL_BINARY, 30)
        spread = []
        for temperature in (100.0, 0.01):
            found = trained(ALL_BINARY, inputs, labels, "srdml_entropic", 0.5, epochs=3, temperature=temperature)
            spread.append(max(map(max, found.relations)))
        assert spread[0] == pytest.approx(1 / 3, rel=0.01), "of three pairs"
        assert spread[1] > 0.5


class TestPretraining:
    def test_is_hard_sharing_whose_best_weights_the_method_starts_with(self):
        inputs, labels = drawn(MIXED, 30)
        common = {"epochs": 3, "batch_size": 7}
        base = trained(MIXED, inputs, labels, **common).model
        one = trained(MIXED, inputs, labels, "srdml_entropic", 0.5, pretraining_epochs=3, **common)
        other = trained(MIXED, inputs, labels, "srdml_entropic", 0.5, model=base, **common)
        assert same_weights(one.model, other.model)
        assert one.to_dict() == other.to_dict()


class TestBadOptions:
    def test_evaluations(self):
        with pytest.raises(OptionError, match="found 0 evaluations. Use 1 or more"):
            train_tasks(
                lambda: net(MIXED),
                Data(MIXED, examples(*drawn(MIXED)), examples(*drawn(MIXED)), None),
                METHODS["hard_sharing"],
                0.0,
                Options(epochs=1, batch_size=5, learning_rate=0.1, evaluations=0),
                seed=0,
            )

    def test_outputs_that_are_never_finite_keep_the_first_weights(self):
        inputs, labels = drawn(MIXED, 30)
        before = net(MIXED)
        ours = trained(MIXED, inputs, labels, learning_rate=1e200, epochs=2, batch_size=7)
        assert (ours.best_epoch, ours.validation) == (0, -math.inf)
        assert same_weights(ours.model, before)


def test_slow_loss_is_that_of_torch():
    """So that the loops above are no circle."""
    output, label = torch.randn(3, dtype=torch.float64), 2.0
    ours = slow_loss(MIXED["which"], output, label)
    assert ours.item() == pytest.approx(functional.cross_entropy(output[None], torch.tensor([2])).item())
