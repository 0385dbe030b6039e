"""Metrics of every kind of task, against scikit-learn."""

import math

import numpy
import pytest
import torch
from sklearn import metrics

from recipes.data.task_kinds import BINARY
from recipes.training.metrics import METRICS_OF, area_under_curve, macro, selection_score, task_scores

from ..support.mixed_tasks import MIXED, NAN, drawn


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
        f1 = metrics.f1_score(labels[rows, 1].numpy(), outputs[rows, 1:4].argmax(1).numpy(), average="macro")
        assert found["which"] == pytest.approx({"accuracy": accuracy, "macro_f1": f1})
        rows = known[:, 2]
        predicted = outputs[rows, 4] * 3.0 + 2.0
        nmse = metrics.mean_squared_error(labels[rows, 2].numpy(), predicted.numpy()) / 9.0
        pearson = numpy.corrcoef(labels[rows, 2], predicted)[0, 1]
        assert found["much"] == pytest.approx({"nmse": nmse, "pearson": pearson}, rel=1e-5)
        chosen_by = (expected["auc"] + accuracy + 1 - nmse) / 3
        assert selection_score(task_scores(outputs, labels, MIXED), MIXED) == pytest.approx(chosen_by, rel=1e-5)

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
        assert selection_score(task_scores(outputs, labels, MIXED), MIXED) == -math.inf
        assert selection_score(task_scores(torch.randn(6, 5), torch.full((6, 3), NAN), MIXED), MIXED) == -math.inf

    def test_macro_leaves_out_what_has_no_value(self):
        found = macro({"a": {"auc": 0.5, "accuracy": 1.0}, "b": {"auc": NAN, "accuracy": 0.0}, "c": {"nmse": NAN}})
        assert math.isnan(found.pop("nmse"))
        assert found == {"auc": 0.5, "accuracy": 0.5}

    def test_constant_predictions_have_no_correlation(self):
        """Of a number: nMSE stays, and Pearson's correlation is not a number."""
        found = task_scores(torch.ones(4, 5), drawn(MIXED, 4, missing=-1.0)[1], MIXED)["much"]
        assert math.isfinite(found["nmse"])
        assert math.isnan(found["pearson"])


class TestAreaUnderCurve:
    @pytest.mark.parametrize("seed", range(3))
    def test_is_that_of_scikit_learn_with_ties(self, seed):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randint(0, 9, (60,), generator=generator).float()
        labels = (torch.rand(60, generator=generator) < 0.3).float()
        assert area_under_curve(logits, labels) == pytest.approx(metrics.roc_auc_score(labels, logits), rel=1e-12)

    def test_is_the_share_of_pairs_in_order(self):
        logits, labels = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0])
        assert area_under_curve(logits, labels) == 3.5 / 4
        assert area_under_curve(-logits, labels) == 0.5 / 4

    def test_one_class_alone_has_none(self):
        assert math.isnan(area_under_curve(torch.randn(4), torch.ones(4)))
        assert math.isnan(area_under_curve(torch.randn(4), torch.zeros(4)))

    def test_known_values_of_all_metrics(self):
        logits = torch.tensor([[2.0, -1.0], [1.0, -2.0], [-1.0, -3.0], [-2.0, -4.0]])
        labels = torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
        found = task_scores(logits, labels, {"one": BINARY, "two": BINARY})
        assert found["one"] == {"accuracy": 0.5, "auc": 0.5, "precision": 0.5, "recall": 0.5}
        assert found["two"] == {"accuracy": 0.75, "auc": 1.0, "precision": 0.0, "recall": 0.0}


class TestSelectionScore:
    def test_task_without_a_value_is_left_out(self):
        scores = {"yes": {"auc": 0.75}, "which": {"accuracy": NAN}, "much": {"nmse": 0.5}}
        assert selection_score(scores, MIXED) == 0.625
        assert selection_score({"much": {"nmse": 3.0}}, MIXED) == -2.0
        assert selection_score({}, MIXED) == -math.inf
