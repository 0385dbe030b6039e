"""Rows of docs/models.md on training, with models written the way people write them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency_reg import RelationWeights, SaliencyRegularizer, task_distances
from tests.support.paths import ROOT

from .support import TASKS, SoftSharing, attached, mlp, sum_of_distances

PAGE = ROOT / "docs" / "models.md"


def test_two_forwards_before_one_backward() -> None:
    """As with two views of each image: a call after each forward, and one backward."""
    model = SoftSharing()
    regularizer = attached(model)
    first, second = torch.randn(4, 5), torch.randn(4, 5)
    losses = []
    for view in (first, second):
        outputs = model(view)
        losses.append(sum(output.square().mean() for output in outputs.values()) + regularizer())
    sum(losses).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for view in (first, second):
        outputs = model(view)
        (sum(output.square().mean() for output in outputs.values()) + regularizer()).backward()
    for ours, parameter in zip(found, model.parameters()):
        torch.testing.assert_close(ours, parameter.grad)


def test_checkpointed_backbone() -> None:
    class Checkpointed(SoftSharing):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return super().forward(checkpoint(self.backbone, x, use_reentrant=False))

    model = Checkpointed()
    regularizer = attached(model)
    x = torch.randn(4, 5)
    (sum(output.mean() for output in model(x).values()) + regularizer()).backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    feature = model.backbone(x)
    outputs = {task: tower(feature) for task, tower in model.towers.items()}
    regularizer.enabled = False
    (sum(output.mean() for output in outputs.values()) + sum_of_distances(outputs, feature)).backward()
    for ours, parameter in zip(found, model.parameters()):
        torch.testing.assert_close(ours, parameter.grad)


def test_partially_labelled_batches() -> None:
    """The saliency of the output needs no labels; that of the loss takes per-sample losses, 0 where there is none."""
    torch.manual_seed(0)
    model, x = SoftSharing(), torch.randn(6, 5)
    labels = torch.randint(2, (6, 3)).float()
    known = torch.rand(6, 3) < 0.5
    known[:, 2] = False  # a task without any label in this batch
    regularizer = attached(model, target="loss")
    outputs = model(x)
    losses = {
        task: nn.functional.binary_cross_entropy_with_logits(output[:, 0], labels[:, t], reduction="none") * known[:, t]
        for t, (task, output) in enumerate(outputs.items())
    }
    penalty = regularizer(losses=losses)
    assert regularizer.report is not None
    leaf = x.clone().requires_grad_()
    fresh = model(leaf)
    rows = []
    for t, task in enumerate(TASKS):
        error = torch.sigmoid(fresh[task][:, :1]) - labels[:, t : t + 1]
        (gradient,) = torch.autograd.grad(fresh[task].sum(), leaf, retain_graph=True)
        rows.append(gradient * error * known[:, t : t + 1])
    torch.testing.assert_close(penalty, task_distances(torch.stack(rows)).triu(1).sum())
    (sum(loss.sum() for loss in losses.values()) + penalty).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:no backward pass has reached")
def test_many_tasks_are_sampled_without_bias() -> None:
    """The mean over draws is the penalty of all pairs, and the draw leaves the global generator alone."""
    torch.manual_seed(0)
    heads = nn.ModuleList([mlp(6) for _ in range(7)])
    backbone = nn.Linear(5, 6)
    tasks = [str(task) for task in range(7)]
    feature = backbone(torch.randn(4, 5))
    relations = RelationWeights(7, "fixed", matrix=(lambda m: m.triu(1) + m.triu(1).T)(torch.rand(7, 7)))
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    outputs = [head(feature) for head in heads]
    state = torch.get_rng_state()
    sampled = SaliencyRegularizer(
        None, tasks=tasks, strength=1.0, relations=relations, max_tasks_per_step=3, metric="l1"
    )
    for _ in range(1500):
        found[True].append(sampled(outputs=outputs, features=feature).detach())
        sampled.step()
    assert torch.equal(torch.get_rng_state(), state)
    whole = SaliencyRegularizer(None, tasks=tasks, strength=1.0, relations=relations, metric="l1")
    expected = float(whole(outputs=outputs, features=feature).detach())
    values = torch.stack(found[True])
    assert float(values.mean()) == pytest.approx(expected, abs=4 * float(values.std()) / 1500**0.5)
    assert float(values.std()) > 0.01 * expected
    again = SaliencyRegularizer(None, tasks=tasks, strength=1.0, relations=relations, max_tasks_per_step=3, metric="l1")
    again.load_state_dict(sampled.state_dict())
    assert torch.equal(again(outputs=outputs, features=feature), sampled(outputs=outputs, features=feature))
