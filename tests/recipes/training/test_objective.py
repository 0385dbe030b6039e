"""Losses, weights and predictions of tasks of every kind, against loops."""

import math

import pytest
import torch
from torch.nn import functional

from recipes.data.task_kinds import columns_of
from recipes.training.loss_sums import weighted_sums
from recipes.training.objective import MultiTaskObjective

from ..support.mixed_tasks import KINDS, MIXED, NAN, SAMPLES, drawn, net, slow_loss, slow_total


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
        assert objective.regularizer_arguments(batch, losses) == {"losses": 0}

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
            assert torch.equal(found["outputs"][:, columns], model(inputs)[task].reshape(SAMPLES, -1))
        assert found["labels"] is labels
        half = MultiTaskObjective(MIXED).predictions(model.to(torch.bfloat16), (inputs.bfloat16(), labels))
        assert half["outputs"].dtype == torch.float32, "metrics need more digits"

    @KINDS
    def test_mean_losses_are_those_of_a_loop(self, kinds):
        model, (inputs, labels) = net(kinds), drawn(kinds)
        objective = MultiTaskObjective(kinds)
        found = objective.mean_losses(objective.predictions(model, (inputs, labels))["outputs"], labels)
        assert list(found) == list(kinds)
        assert sum(found.values()) == pytest.approx(slow_total(model, kinds, inputs, labels).item(), rel=1e-12)
        labels[:, 1] = NAN
        none = objective.mean_losses(objective.predictions(model, (inputs, labels))["outputs"], labels)
        assert [math.isnan(loss) for loss in none.values()] == [False, True, False]


def test_slow_loss_is_that_of_torch():
    """So that the loops above are no circle."""
    output, label = torch.randn(3, dtype=torch.float64), 2.0
    ours = slow_loss(MIXED["which"], output, label)
    assert ours.item() == pytest.approx(functional.cross_entropy(output[None], torch.tensor([2])).item())

    @pytest.mark.parametrize("apart", [False, True])
    @KINDS
    def test_losses_of_single_samples_for_their_saliency(self, kinds, apart):
        model, (inputs, labels) = net(kinds), drawn(kinds)
        objective = MultiTaskObjective(kinds, apart=apart, of_losses=True)
        losses = objective.losses(model, (inputs, labels))
        found = objective.regularizer_arguments((inputs, labels), losses)["losses"]
        assert list(found) == list(kinds)
        for column, (task, kind) in enumerate(kinds.items()):
            assert found[task].requires_grad
            for row in range(SAMPLES):
                label, own = labels[row, column], found[task][row].item()
                expected = 0.0 if math.isnan(label) else slow_loss(kind, model(inputs)[task][row], label).item()
                assert own == pytest.approx(expected, rel=1e-12), "without a label there is no saliency"
