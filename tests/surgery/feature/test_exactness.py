"""Surgery at the feature map equals the explicit computation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, PCGrad, RelationWeights, SaliencyRegularizer
from saliency_reg.errors import ConfigurationError, SurgeryError
from tests.reference.slow_fork import Expected, slow_step
from tests.reference.slow_surgery import textbook_pcgrad
from tests.support.zoo import TASKS, build

from .support import assert_gradients, losses_of, named_outputs, pcgrad


class DropoutHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.4), nn.Linear(5, 1))

    def forward(self, feature: Tensor) -> Tensor:
        return self.layers(feature)


def dropout_model() -> nn.Module:
    torch.manual_seed(0)
    entry = build("tanh heads")
    entry.model.heads = nn.ModuleDict({task: DropoutHead() for task in TASKS}).double()
    return entry.model


@pytest.mark.parametrize("strength", [0.0, 0.7])
@pytest.mark.parametrize(
    "name",
    [
        "linear heads",
        "relu heads",
        "tanh heads",
        "tanh heads, 3 classes",
        "pooling heads",
        "dense heads",
        "token heads",
        "linear columns",
        "mlp columns",
    ],
)
def test_equals_the_explicit_computation(name: str, strength: float) -> None:
    seed = 4 if name == "mlp columns" else 1
    entry = build(name, seed)
    expected = slow_step(entry.model, entry.inputs, losses_of, pcgrad, strength)
    assert expected.conflicts > 0
    options = {"heads": "heads", "scalarize": "sum", **entry.options}
    regularizer = SaliencyRegularizer(
        entry.model,
        strength=strength,
        relations=RelationWeights(3, "fixed"),
        surgery=PCGrad(),
        **{"metric": "l1", **options},
    )
    outputs = named_outputs(entry.model(entry.inputs))
    (sum(losses_of(outputs).values()) + regularizer()).backward()
    assert_gradients(entry.model, expected)
    plain = slow_step(build(name, seed).model, entry.inputs, losses_of, sum, strength)
    backbone = next(iter(expected.gradients))
    assert (expected.gradients[backbone] - plain.gradients[backbone]).abs().max() > 1e-3
    report = regularizer.report.surgery
    assert report.conflicts == pytest.approx(expected.conflicts / 3)
    flat = [gradient.flatten() for gradient in expected.task_gradients]
    torch.testing.assert_close(report.gramian, torch.stack([torch.stack([a @ b for a in flat]) for b in flat]))


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_dropout_heads_draw_one_mask(strength: float) -> None:
    model = dropout_model()
    for seed in range(20):  # until there is a conflict
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.manual_seed(5)
        expected = slow_step(model, inputs, losses_of, pcgrad, strength)
        if expected.conflicts:
            break
    assert expected.conflicts > 0
    regularizer = SaliencyRegularizer(
        model, "heads", strength=strength, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), metric="l1"
    )
    torch.manual_seed(5)
    (sum(losses_of(model(inputs)).values()) + regularizer()).backward()
    assert_gradients(model, expected)


def test_a_feature_in_front_of_what_the_heads_read() -> None:
    entry = build("trunk", seed=2)
    model = entry.model
    surgery_at = copy.deepcopy(model)
    regularizer = SaliencyRegularizer(
        model,
        strength=0.5,
        relations=RelationWeights(3, "fixed"),
        surgery=PCGrad(),
        **{"metric": "l1", **entry.options},
    )
    (sum(losses_of(model(entry.inputs)).values()) + regularizer()).backward()
    # By hand: surgery where the heads read, the penalty from the map in front of the trunk.
    feature = surgery_at.stem(entry.inputs)
    hidden = surgery_at.trunk(feature)
    outputs = {task: getattr(surgery_at, f"head_{task}")(hidden) for task in TASKS}
    losses = losses_of(outputs)
    task_gradients = [torch.autograd.grad(loss, hidden, retain_graph=True)[0] for loss in losses.values()]
    combined = pcgrad(task_gradients)
    assert (combined - sum(task_gradients)).abs().max() > 1e-4
    saliencies = [
        torch.autograd.grad(output.sum(), feature, create_graph=True)[0].sum((2, 3)) for output in outputs.values()
    ]
    penalty = sum((a - b).abs().sum(1).mean() for i, a in enumerate(saliencies) for b in saliencies[:i]) * (0.5 / 3)
    for name, parameter in surgery_at.named_parameters():
        through = (
            torch.autograd.grad(sum(losses.values()), parameter, retain_graph=True)[0]
            if name.startswith("head")
            else torch.autograd.grad(hidden, parameter, combined, retain_graph=True)[0]
        )
        (extra,) = torch.autograd.grad(penalty, parameter, retain_graph=True, allow_unused=True)
        through = through if extra is None else through + extra
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, through, rtol=1e-10, atol=1e-10)


def test_without_the_penalty_as_an_object_of_its_own() -> None:
    entry = build("tanh heads", seed=1)
    expected = slow_step(entry.model, entry.inputs, losses_of, pcgrad)
    with FeatureSurgery(entry.model, "heads") as surgery:
        assert surgery.report is None
        sum(losses_of(entry.model(entry.inputs)).values()).backward()
        assert_gradients(entry.model, expected)
        assert surgery.report.weights.shape == (3,)
    for parameter in entry.model.parameters():
        parameter.grad = None
    sum(losses_of(entry.model(entry.inputs)).values()).backward()
    assert_gradients(entry.model, slow_step(entry.model, entry.inputs, losses_of, sum))


def test_values_and_graph_are_those_of_the_model() -> None:
    entry = build("dense heads")
    before = entry.model(entry.inputs)
    with FeatureSurgery(entry.model, "heads"):
        after = entry.model(entry.inputs)
    assert all(torch.equal(before[task], after[task]) for task in TASKS)
    # Without gradients nothing is made.
    with FeatureSurgery(entry.model, "heads"), torch.no_grad():
        assert not any(output.requires_grad for output in entry.model(entry.inputs).values())


def test_no_conflict_is_a_plain_step() -> None:
    entry = build("tanh heads")
    twin = copy.deepcopy(entry.model)
    twin.heads = nn.ModuleDict({task: copy.deepcopy(twin.heads["first"]) for task in TASKS})
    FeatureSurgery(twin, "heads", weighting=PCGrad())
    sum(output.square().mean() for output in twin(entry.inputs).values()).backward()
    plain = copy.deepcopy(twin)
    plain.zero_grad()
    sum(output.square().mean() for output in plain(entry.inputs).values()).backward()
    for ours, theirs in zip(twin.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_loss_terms_beside_the_heads_pass() -> None:
    entry = build("tanh heads", seed=1)
    model = entry.model
    kept: list[Tensor] = []
    handle = model.backbone.register_forward_hook(lambda module, args, output: kept.append(output))
    expected = slow_step(model, entry.inputs, losses_of, pcgrad, bypass=lambda feature: feature.pow(2).sum())
    kept.clear()
    FeatureSurgery(model, "heads")
    outputs = model(entry.inputs)
    (sum(losses_of(outputs).values()) + kept[0].pow(2).sum()).backward()
    assert_gradients(model, expected)
    handle.remove()


def test_a_task_without_a_loss() -> None:
    entry = build("tanh heads", seed=1)

    def without_second(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = losses_of(outputs)
        del losses["second"]
        return losses

    order = PCGrad().order(3, 0)
    two = torch.tensor([[1], [0]])
    assert {int(row) for row in order[0]} == {1, 2}
    expected = slow_step(entry.model, entry.inputs, without_second, lambda g: textbook_pcgrad(g, two))
    surgery = FeatureSurgery(entry.model, "heads")
    sum(without_second(entry.model(entry.inputs)).values()).backward()
    assert_gradients(entry.model, expected)
    assert entry.model.heads["second"][0].weight.grad is None
    assert torch.isnan(surgery.report.weights[1])
    assert surgery.report.conflicts in (0.0, 1.0)


def test_a_head_that_did_not_run() -> None:
    entry = build("tanh heads", seed=1)
    surgery = FeatureSurgery(entry.model, "heads")
    feature = entry.model.backbone(entry.inputs)
    outputs = {task: entry.model.heads[task](feature) for task in ("first", "third")}
    sum(losses_of(outputs).values()).backward()
    assert surgery.report.weights.isnan().tolist() == [False, True, False]


def test_a_second_backward_pass_and_passes_of_parts() -> None:
    """What arrived in one pass does not leak into another."""
    entry = build("tanh heads", seed=1)
    model = entry.model
    expected = slow_step(model, entry.inputs, losses_of, lambda g: pcgrad(g, 2), 0.7)
    without_tasks = slow_step(model, entry.inputs, lambda outputs: {"first": 0 * outputs["first"].sum()}, sum, 0.7)
    regularizer = SaliencyRegularizer(
        model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), metric="l1"
    )
    losses = losses_of(model(entry.inputs))
    penalty = regularizer()
    torch.autograd.grad(losses["second"], model.heads["second"][0].weight, retain_graph=True)
    penalty.backward(retain_graph=True)
    assert_gradients(model.backbone, _of(without_tasks, "backbone."))
    for parameter in model.parameters():
        parameter.grad = None
    (sum(losses.values()) + penalty).backward(retain_graph=True)
    for parameter in model.parameters():
        parameter.grad = None
    (sum(losses.values()) + penalty).backward()
    assert_gradients(model, expected)


def _of(expected: Expected, prefix: str) -> Expected:
    gradients = {name.removeprefix(prefix): value for name, value in expected.gradients.items() if prefix in name}
    return Expected(gradients, expected.task_gradients, expected.conflicts)


@pytest.mark.parametrize("name", ["MGDAWeighting", "UPGradWeighting", "IMTLGWeighting", "AlignedMTLWeighting", "MGDA"])
def test_torchjd_weightings_plug_in(name: str) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    if name == "UPGradWeighting":
        pytest.importorskip("quadprog")
    weighting = getattr(aggregation, name)()
    plain = getattr(weighting, "gramian_weighting", weighting)
    entry = build("tanh heads", seed=1)

    def combine(gradients: list[Tensor]) -> Tensor:
        flat = torch.stack([gradient.flatten() for gradient in gradients])
        return (plain(flat @ flat.T) @ flat).view_as(gradients[0])

    expected = slow_step(entry.model, entry.inputs, losses_of, combine)
    FeatureSurgery(entry.model, "heads", weighting=weighting)
    sum(losses_of(entry.model(entry.inputs)).values()).backward()
    assert_gradients(entry.model, expected, 1e-8)


def test_a_weighting_sees_no_zero_gradient() -> None:
    """MGDA would give all the weight to a task without a gradient, and training would stop."""
    seen: list[list[int]] = []

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(list(gramian.shape))
        return torch.arange(1.0, len(gramian) + 1)

    entry = build("tanh heads")
    surgery = FeatureSurgery(entry.model, "heads", weighting=weighting)
    losses = losses_of(entry.model(entry.inputs))
    (losses["first"] + 0 * losses["second"] + losses["third"]).backward()
    assert seen[-1] == [2, 2]
    assert surgery.report.weights[[0, 2]].tolist() == [1.0, 2.0]


def test_task_gradients_can_be_read() -> None:
    for name in ("tanh heads", "linear columns", "mlp columns"):
        entry = build(name, seed=1)
        expected = slow_step(entry.model, entry.inputs, losses_of, sum)
        surgery = FeatureSurgery(entry.model, **{"heads": "heads", **entry.options})
        with pytest.raises(ConfigurationError, match="keep_task_gradients = True"):
            _ = surgery.task_gradients
        surgery.keep_task_gradients = True
        loss = sum(losses_of(named_outputs(entry.model(entry.inputs))).values())
        with pytest.raises(SurgeryError, match=r"loss.backward\(\) first"):
            _ = surgery.task_gradients
        loss.backward()
        assert list(surgery.task_gradients) == list(TASKS)
        for (gradient,), wanted in zip(surgery.task_gradients.values(), expected.task_gradients):
            torch.testing.assert_close(gradient, wanted)
