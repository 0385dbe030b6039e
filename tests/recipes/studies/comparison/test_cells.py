"""One training of the comparison: what is kept of it, the guess without inputs, and what its optimizer decays."""

import json
import math

import pytest
import torch
from torch.nn import functional

from recipes.compare import COMMAND
from recipes.data.task_kinds import TaskKind
from recipes.models.small_networks import small_blueprint
from recipes.studies.comparison.cells import constant_outputs, labels_of
from recipes.training.metrics import task_scores

from .small import trained

KINDS = {"yes": TaskKind("binary"), "kind": TaskKind("classes", 3), "size": TaskKind("number", mean=5.0, spread=2.0)}
LABELS = torch.tensor([[1, 0, 4], [0, 1, 6], [0, 1, math.nan], [0, 1, 8], [math.nan, 2, 2.0]])


class TestConstant:
    def test_is_the_prior_of_the_labels(self):
        outputs = constant_outputs(KINDS, LABELS)
        assert outputs.dtype == torch.float64
        assert outputs[0].sigmoid() == pytest.approx(2 / 6), "one more of each"
        assert outputs[1:4].softmax(0).tolist() == pytest.approx([2 / 8, 4 / 8, 2 / 8])
        assert 5.0 + 2.0 * outputs[4] == pytest.approx((4 + 6 + 8 + 2) / 4)

    def test_no_other_constant_has_a_smaller_loss(self):
        """But for the one more, which keeps logits finite: with very many labels it is gone."""
        labels = LABELS.repeat(10_000, 1)
        outputs = constant_outputs(KINDS, labels)

        def loss(values):
            known = labels[:, 0][~labels[:, 0].isnan()].double()
            size = labels[:, 2][~labels[:, 2].isnan()].double()
            return (
                functional.binary_cross_entropy_with_logits(values[0].expand(len(known)), known)
                + functional.cross_entropy(values[1:4].expand(len(labels), -1), labels[:, 1].long())
                + (values[4] - (size - 5.0) / 2.0).square().mean()
            )

        gradient = torch.func.grad(loss)(outputs)
        assert gradient.abs().max() < 1e-4

    def test_scores(self):
        outputs = constant_outputs(KINDS, LABELS).expand(len(LABELS), -1)
        scores = task_scores(outputs, LABELS, KINDS)
        assert scores["yes"] == {"auc": 0.5, "accuracy": 0.75, "precision": 0.0, "recall": 0.0}
        assert scores["kind"]["accuracy"] == 0.6
        known = torch.tensor([4.0, 6, 8, 2])
        assert scores["size"]["nmse"] == pytest.approx(float(known.var(correction=0)) / 4)

    def test_a_task_without_labels(self):
        labels = torch.full((3, 3), math.nan)
        assert torch.isfinite(constant_outputs(KINDS, labels)).all()


class OneByOne:
    """Samples that are made when they are asked for."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.zeros(2), torch.tensor([float(index), math.nan])


def test_labels_of_samples_that_have_no_table():
    assert labels_of(OneByOne())[:, 0].tolist() == [0, 1, 2, 3]


class TestKept:
    def test_a_trial_keeps_the_score_alone(self, tmp_path):
        found = trained(COMMAND, "digits", "", "srdml", tmp_path, reported=False)
        assert found.pop("validation") > 0
        assert found == {"macro": {}, "scores": {}, "curves": {}, "relations": None, "costs": {}}

    def test_costs_change_no_number(self, tmp_path):
        """What was measured, and whether, is nowhere in the training."""
        one, again = (trained(COMMAND, "digits", "", "srdml+pcgrad", tmp_path / name) for name in "ab")
        trial = trained(COMMAND, "digits", "", "srdml+pcgrad", tmp_path / "c", reported=False)
        assert trial["validation"] == one["validation"]
        del one["costs"]["seconds_per_step"], again["costs"]["seconds_per_step"]
        assert one == again

    def test_numbers_are_short(self, tmp_path):
        text = json.dumps(trained(COMMAND, "digits", "", "srdml", tmp_path)["relations"])
        assert max(map(len, text.strip("[]").replace("], [", ", ").split(", "))) <= len("1.23e-05")

    def test_methods_cost_what_they_should(self, tmp_path):
        hard, single, surgery = (
            trained(COMMAND, "digits", "", name, tmp_path / name)["costs"]
            for name in ("hard_sharing", "single_task", "pcgrad@parameters")
        )
        shared = sum(own.numel() for own in small_blueprint(["a"], "gelu").backbone().parameters())
        assert single["parameters"] == hard["parameters"] + 9 * shared
        assert surgery["peak_memory"] > hard["peak_memory"]
        assert single["peak_memory"] > 16 * single["parameters"]
