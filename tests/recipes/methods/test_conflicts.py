"""How often task gradients conflict."""

import pytest
import torch
from torch.nn import functional

from recipes.data.digits import digit_splits
from recipes.methods.conflicts import ConflictWatch
from recipes.models.small_networks import SharedNetwork


def test_conflicts_are_those_of_the_task_gradients_at_the_feature_map():
    splits = digit_splits(0, 3, 3)
    torch.manual_seed(0)
    model = SharedNetwork(splits.tasks, "gelu")
    watch = ConflictWatch(model)
    for parameter in model.parameters():
        parameter.data *= 1.5
    inputs, labels = splits.train.inputs, splits.train.labels
    feature = model.backbone(inputs)
    losses = [
        functional.binary_cross_entropy_with_logits(head(feature).squeeze(1), truth)
        for head, truth in zip(model.heads.values(), labels.unbind(1))
    ]
    rows = torch.stack([torch.autograd.grad(loss, feature, retain_graph=True)[0].flatten() for loss in losses])
    products = (rows @ rows.T)[torch.triu_indices(10, 10, 1).unbind()]
    assert watch.measure(inputs, labels) == pytest.approx(float((products < 0).float().mean()))
    assert all(parameter.grad is None for parameter in model.parameters())
