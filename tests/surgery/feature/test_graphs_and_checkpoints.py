"""Surgery in the graphs that people train with: accumulated, frozen, checkpointed, compiled, hooked, and freed in time."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency_reg import FeatureSurgery, PCGrad, RelationWeights, SaliencyRegularizer
from saliency_reg.errors import CaptureError
from saliency_reg.surgery.feature.fork import GradientFork
from tests.reference.slow_fork import slow_step
from tests.support.zoo import build, mlp

from .support import assert_gradients, losses_of, pcgrad, with_heads


def test_accumulation_weighs_each_micro_batch() -> None:
    entry = build("tanh heads", seed=1)
    halves = entry.inputs.chunk(2)
    expected = [
        slow_step(entry.model, half, losses_of, lambda g, call=call: pcgrad(g, call))
        for call, half in enumerate(halves)
    ]
    FeatureSurgery(entry.model, "heads")
    for half in halves:
        sum(losses_of(entry.model(half)).values()).backward()
    for name, parameter in entry.model.named_parameters():
        torch.testing.assert_close(parameter.grad, sum(one.gradients[name] for one in expected))


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_frozen_backbone(strength: float) -> None:
    entry = build("tanh heads", seed=1)
    entry.model.backbone.requires_grad_(False)
    regularizer = SaliencyRegularizer(
        entry.model, "heads", strength=strength, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), metric="l1"
    )
    (sum(losses_of(entry.model(entry.inputs)).values()) + regularizer()).backward()
    twin = build("tanh heads", seed=1).model
    expected = slow_step(twin, entry.inputs, losses_of, sum, strength)
    for name, parameter in entry.model.heads.named_parameters(prefix="heads"):
        torch.testing.assert_close(parameter.grad, expected.gradients[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_backbone(use_reentrant: bool) -> None:
    entry = build("tanh heads", seed=1)
    expected = slow_step(entry.model, entry.inputs, losses_of, pcgrad, 0.7)
    model = entry.model
    model.feature_map = lambda x: checkpoint(model.backbone, x, use_reentrant=use_reentrant)
    regularizer = SaliencyRegularizer(
        model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), metric="l1"
    )
    (sum(losses_of(model(entry.inputs.requires_grad_())).values()) + regularizer()).backward()
    assert_gradients(model, expected)


@pytest.mark.parametrize("name", ["tanh heads", "mlp columns", "linear columns"])
def test_checkpointed_heads(name: str) -> None:
    entry = build(name, seed=1)
    expected = slow_step(entry.model, entry.inputs, losses_of, pcgrad)
    model, from_feature = entry.model, entry.model.from_feature
    feature_map, forward = model.feature_map, nn.Module.forward
    del forward
    FeatureSurgery(model, **{"heads": "heads", **entry.options})
    outputs = checkpoint(lambda x: from_feature(feature_map(x)), entry.inputs, use_reentrant=False)
    sum(losses_of(outputs).values()).backward()
    assert_gradients(model, expected)


def test_heads_in_a_reentrant_checkpoint_are_refused() -> None:
    entry = build("tanh heads", seed=1)
    FeatureSurgery(entry.model, "heads")
    outputs = checkpoint(lambda x: tuple(entry.model(x).values()), entry.inputs.requires_grad_(), use_reentrant=True)
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        sum(outputs).sum().backward()


def test_compiled_backbone() -> None:
    entry = build("tanh heads", seed=1)
    expected = slow_step(entry.model, entry.inputs, losses_of, pcgrad, 0.7)
    model = entry.model
    model.backbone.compile()
    regularizer = SaliencyRegularizer(
        model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), metric="l1"
    )
    (sum(losses_of(model(entry.inputs)).values()) + regularizer()).backward()
    assert_gradients(model, expected)


def test_target_loss() -> None:
    entry = build("tanh heads", seed=1)
    model = entry.model
    regularizer = SaliencyRegularizer(
        model,
        "heads",
        strength=0.7,
        target="loss",
        relations=RelationWeights(3, "fixed"),
        surgery=PCGrad(),
        metric="l1",
    )
    losses = losses_of(model(entry.inputs))
    (sum(losses.values()) + regularizer(losses=losses)).backward()
    twin = build("tanh heads", seed=1).model
    feature = twin.feature_map(entry.inputs)
    losses = losses_of(twin.from_feature(feature))
    task_gradients = [torch.autograd.grad(loss, feature, create_graph=True)[0] for loss in losses.values()]
    scaled = [gradient * len(feature) for gradient in task_gradients]
    penalty = sum((a - b).abs().sum(1).mean() for i, a in enumerate(scaled) for b in scaled[:i]) * 0.7 / 3
    (extra,) = torch.autograd.grad(penalty, feature, retain_graph=True)
    at_feature = pcgrad([gradient.detach() for gradient in task_gradients]) + extra
    for name, parameter in twin.backbone.named_parameters():
        (wanted,) = torch.autograd.grad(feature, parameter, at_feature, retain_graph=True)
        torch.testing.assert_close(dict(model.backbone.named_parameters())[name].grad, wanted)
    for name, parameter in twin.heads.named_parameters():
        (wanted,) = torch.autograd.grad(sum(losses.values()) + penalty, parameter, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(dict(model.heads.named_parameters())[name].grad, wanted)


def test_gradient_penalty_of_the_user_is_left_alone() -> None:
    entry = build("tanh heads", seed=1)
    FeatureSurgery(entry.model, "heads")
    x = entry.inputs.requires_grad_()
    (ours,) = torch.autograd.grad(sum(losses_of(entry.model(x)).values()), x, create_graph=True)
    twin = build("tanh heads", seed=1).model
    (theirs,) = torch.autograd.grad(sum(losses_of(twin(x)).values()), x, create_graph=True)
    torch.testing.assert_close(ours, theirs)
    assert ours.requires_grad


def test_enabled_and_remove() -> None:
    entry = build("tanh heads", seed=1)
    surgery = FeatureSurgery(entry.model, "heads")
    surgery.enabled = False
    sum(losses_of(entry.model(entry.inputs)).values()).backward()
    assert surgery.report is None
    assert_gradients(entry.model, slow_step(build("tanh heads", seed=1).model, entry.inputs, losses_of, sum))
    surgery.remove()
    assert "__getstate__" not in vars(entry.model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in entry.model.modules())


def test_the_graph_keeps_nothing_alive() -> None:
    def forks() -> set[int]:
        return {id(found) for found in gc.get_objects() if type(found) is GradientFork}

    before = forks()  # of other tests
    entry = build("tanh heads", seed=1)
    regularizer = SaliencyRegularizer(entry.model, "heads", surgery=PCGrad(), strength=0.1, metric="l1")
    loss = sum(losses_of(entry.model(entry.inputs)).values())
    gone = weakref.ref(regularizer.surgery)
    del regularizer
    gc.collect()
    assert gone() is None
    loss.backward()  # without surgery
    assert_gradients(entry.model, slow_step(build("tanh heads", seed=1).model, entry.inputs, losses_of, sum))
    FeatureSurgery(entry.model, "heads")  # lives as long as its model
    sum(losses_of(entry.model(entry.inputs)).values()).backward()
    entry.model(entry.inputs)
    model = weakref.ref(entry.model)
    del entry, loss
    gc.collect()
    assert model() is None
    assert forks() <= before


class Tail(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.layers, self.function = mlp(nn.Tanh()), function

    def forward(self, feature: Tensor) -> Tensor:
        return self.function(self.layers(feature))


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh, torch.exp])
def test_heads_whose_last_operation_saves_its_result(function: object) -> None:
    """The penalty sends a gradient to such an output, which is not one of the losses."""
    model, inputs = with_heads(lambda: Tail(function))
    expected = slow_step(model, inputs, losses_of, pcgrad, 3.0)
    regularizer = SaliencyRegularizer(
        model, "heads", strength=3.0, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), metric="l1"
    )
    (sum(losses_of(model(inputs)).values()) + regularizer()).backward()
    assert_gradients(model, expected)


def test_hooks_of_the_user_on_an_output_count() -> None:
    entry = build("tanh heads", seed=1)
    regularizer = SaliencyRegularizer(
        entry.model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), metric="l1"
    )

    def scaled(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = losses_of(outputs)
        return {**losses, "first": 0.01 * losses["first"]}

    expected = slow_step(build("tanh heads", seed=1).model, entry.inputs, scaled, pcgrad, 0.7)
    outputs = entry.model(entry.inputs)
    penalty = regularizer()
    outputs["first"].register_hook(lambda gradient: 0.01 * gradient)
    (sum(losses_of(outputs).values()) + penalty).backward()
    assert_gradients(entry.model, expected)


class NormHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, feature: Tensor) -> Tensor:
        return self.last(self.norm(self.first(feature)).tanh())


@pytest.mark.parametrize("how", ["unfrozen later", "zero at first"])
def test_samples_that_are_mixed_later_on(how: str) -> None:
    model, inputs = with_heads(NormHead)
    for head in model.heads.values():
        if how == "zero at first":
            nn.init.zeros_(head.last.weight)
        else:
            head.norm.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    regularizer = SaliencyRegularizer(
        model,
        "heads",
        strength=0.7,
        relations=RelationWeights(3, "fixed"),
        cross_sample="ignore",
        surgery=PCGrad(),
        metric="l1",
    )
    conflicts = 0
    for call in range(3):
        if call == 1:
            for head in model.heads.values():
                head.norm.train()
        expected = slow_step(copy.deepcopy(model), inputs, losses_of, lambda g, call=call: pcgrad(g, call), 0.7)
        conflicts += expected.conflicts
        optimizer.zero_grad()
        (sum(losses_of(model(inputs)).values()) + regularizer()).backward()
        assert_gradients(model, expected, 1e-9)
        optimizer.step()
    assert conflicts > 0


def test_plain_views_in_front_of_heads_are_fine() -> None:
    entry = build("tanh heads", seed=1)
    expected = slow_step(entry.model, entry.inputs, losses_of, pcgrad)
    model = entry.model
    model.from_feature = lambda feature: {task: head(feature.flatten(1)) for task, head in model.heads.items()}
    model.feature_map = lambda x: model.backbone(x).unsqueeze(2)
    surgery = FeatureSurgery(model, "heads")
    sum(losses_of(model(entry.inputs)).values()).backward()
    assert_gradients(model, expected)
    assert surgery.report is not None


def test_the_report_is_not_that_of_an_earlier_step() -> None:
    entry = build("tanh heads", seed=1)
    regularizer = SaliencyRegularizer(entry.model, "heads", surgery=PCGrad(), strength=0.1, metric="l1")
    (sum(losses_of(entry.model(entry.inputs)).values()) + regularizer()).backward()
    assert regularizer.report.surgery is not None
    regularizer.surgery.enabled = False
    (sum(losses_of(entry.model(entry.inputs)).values()) + regularizer()).backward()
    assert regularizer.report.surgery is None


@pytest.mark.parametrize("name", ["tanh heads", "pooling heads"])
def test_the_penalty_in_a_pass_of_its_own(name: str) -> None:
    entry = build(name, seed=1)
    expected = slow_step(entry.model, entry.inputs, losses_of, pcgrad, 0.7)
    regularizer = SaliencyRegularizer(
        entry.model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), metric="l1"
    )
    losses, penalty = losses_of(entry.model(entry.inputs)), regularizer()
    sum(losses.values()).backward(retain_graph=True)
    weights = regularizer.report.surgery.weights
    penalty.backward()
    assert_gradients(entry.model, expected)
    assert torch.equal(regularizer.report.surgery.weights, weights)
    assert int(regularizer.surgery.weighting.calls) == 1


def test_frozen_backbone_and_checkpointed_heads() -> None:
    entry = build("tanh heads", seed=1)
    entry.model.backbone.requires_grad_(False)
    FeatureSurgery(entry.model, "heads")
    outputs = checkpoint(entry.model.from_feature, entry.model.backbone(entry.inputs), use_reentrant=False)
    sum(losses_of(outputs).values()).backward()
    assert entry.model.heads["first"][0].weight.grad is not None
