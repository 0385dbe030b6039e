"""Gradient surgery at the feature map: equal to the explicit computation, in every setting that people train in."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency_reg import FeatureSurgery, PCGrad, RelationWeights, SaliencyRegularizer
from saliency_reg.errors import (
    CaptureError,
    ConfigurationError,
    ShapeError,
    StateMismatchError,
    SurgeryError,
    TaskError,
    WrongTypeError,
)
from saliency_reg.regularizer.sample_mixing import SampleMixing
from saliency_reg.surgery.feature import penalty_bypass
from saliency_reg.surgery.feature.fork import GradientFork
from saliency_reg.surgery.feature.penalty_bypass import replayed
from tests.reference.slow_fork import Expected, slow_step
from tests.reference.slow_surgery import textbook_pcgrad
from tests.support.zoo import TASKS, Reverse, build, mlp

LOSS_WEIGHTS = dict(zip(TASKS, (1.0, 0.3, 2.5)))


def losses_of(outputs: dict[str, Tensor], seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    losses = {}
    for task, output in outputs.items():
        target = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        losses[task] = LOSS_WEIGHTS[task] * (output - target).square().mean()
    return losses


def pcgrad(gradients: list[Tensor], call: int = 0) -> Tensor:
    return textbook_pcgrad(gradients, PCGrad().order(len(gradients), call))


def named_outputs(output: object) -> dict[str, Tensor]:
    return output if isinstance(output, dict) else dict(zip(TASKS, output.unbind(1)))


def assert_gradients(model: nn.Module, expected: Expected, tolerance: float = 1e-10) -> None:
    for name, parameter in model.named_parameters():
        wanted = expected.gradients[name]
        if wanted is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted, rtol=tolerance, atol=tolerance, msg=name)


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
        entry.model, strength=strength, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), **options
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
        model, "heads", strength=strength, relations=RelationWeights(3, "fixed"), surgery=PCGrad()
    )
    torch.manual_seed(5)
    (sum(losses_of(model(inputs)).values()) + regularizer()).backward()
    assert_gradients(model, expected)


def test_a_feature_in_front_of_what_the_heads_read() -> None:
    entry = build("trunk", seed=2)
    model = entry.model
    surgery_at = copy.deepcopy(model)
    regularizer = SaliencyRegularizer(
        model, strength=0.5, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), **entry.options
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
        model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), surgery=PCGrad()
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


class TwoMaps(nn.Module):
    """Heads that read two maps, as keyword and inside of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.high = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
        self.heads = nn.ModuleDict({task: TwoMapsHead() for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(x)
        high = self.high(low)
        return {task: head([high], low=low) for task, head in self.heads.items()}


class TwoMapsHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 1), nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, maps: list[Tensor], low: Tensor) -> Tensor:
        return self.first(maps[0].tanh()) + self.second(low)


@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_several_feature_maps_are_weighed_together(strength: float) -> None:
    torch.manual_seed(1)
    model, inputs = TwoMaps().double(), torch.randn(6, 5, dtype=torch.float64)
    options = {"heads": "heads", "feature": ["low", "high"]}
    if strength:
        surgery: object = SaliencyRegularizer(
            model, strength=strength, relations=RelationWeights(3, "fixed"), surgery=PCGrad(), **options
        )
    else:
        surgery = FeatureSurgery(model, **options)
    loss = sum(losses_of(model(inputs)).values())
    (loss + surgery() if strength else loss).backward()

    plain = copy.deepcopy(model)
    low = plain.low(inputs)
    high = plain.high(low)
    # Separate leaves, so that the gradient at ``low`` is what comes from the heads alone.
    low_leaf, high_leaf = low.detach().requires_grad_(), high.detach().requires_grad_()
    outputs = {task: head([high_leaf], low=low_leaf) for task, head in plain.heads.items()}
    losses = losses_of(outputs)
    pairs = [torch.autograd.grad(one, [low_leaf, high_leaf], retain_graph=True) for one in losses.values()]
    flat = [torch.cat([part.flatten() for part in pair]) for pair in pairs]
    combined = pcgrad(flat)
    assert (combined - sum(flat)).abs().max() > 1e-4
    at_low, at_high = combined[: low.numel()].view_as(low), combined[low.numel() :].view_as(high)
    if strength:
        # The saliency at ``low`` is that of what the heads read there, not of what goes on to ``high``.
        low_read, high_read = low.view_as(low), high.view_as(high)
        outputs = {task: head([high_read], low=low_read) for task, head in plain.heads.items()}
        saliencies = [
            torch.cat(torch.autograd.grad(output.sum(), [low_read, high_read], create_graph=True), 1)
            for output in outputs.values()
        ]
        penalty = sum((a - b).abs().sum(1).mean() for i, a in enumerate(saliencies) for b in saliencies[:i])
        penalty = penalty * strength / 3
    for name, parameter in plain.named_parameters():
        if name.startswith("heads"):
            (gradient,) = torch.autograd.grad(sum(losses.values()), parameter, retain_graph=True)
        else:
            (gradient,) = torch.autograd.grad([low, high], parameter, [at_low, at_high], retain_graph=True)
        if strength:
            (extra,) = torch.autograd.grad(penalty, parameter, retain_graph=True, allow_unused=True)
            gradient = gradient if extra is None else gradient + extra
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pool", ["sum", None])
@pytest.mark.parametrize("name", ["tanh heads", "pooling heads"])
def test_both_ways_around_the_fork_are_one(name: str, pool: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the saliencies at hand, and with the penalty's gradient taken at once."""
    found = []
    calls: list[tuple] = []
    monkeypatch.setattr(penalty_bypass, "replayed", lambda *args: calls.append(args) or replayed(*args))
    for replay in (False, True):
        calls.clear()
        entry = build(name, seed=1)
        regularizer = SaliencyRegularizer(entry.model, "heads", pool=pool, strength=0.7, surgery=PCGrad())
        loss = sum(losses_of(entry.model(entry.inputs)).values())
        if replay:
            monkeypatch.setattr(SampleMixing, "are_samples_apart", lambda *args, **kwargs: False)
        (loss + regularizer()).backward()
        assert len(calls) == int(replay or (name == "pooling heads" and pool == "sum"))
        found.append({key: parameter.grad for key, parameter in entry.model.named_parameters()})
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-11, atol=1e-12)


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
        entry.model, "heads", strength=strength, relations=RelationWeights(3, "fixed"), surgery=PCGrad()
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
        model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), surgery=PCGrad()
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
        model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), surgery=PCGrad()
    )
    (sum(losses_of(model(entry.inputs)).values()) + regularizer()).backward()
    assert_gradients(model, expected)


def test_target_loss() -> None:
    entry = build("tanh heads", seed=1)
    model = entry.model
    regularizer = SaliencyRegularizer(
        model, "heads", strength=0.7, target="loss", relations=RelationWeights(3, "fixed"), surgery=PCGrad()
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


def test_a_second_output_of_a_columns_head_passes() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, feature: Tensor) -> dict[str, Tensor]:
            hidden = self.hidden(feature).tanh()
            return {"logits": self.out(hidden), "hidden": hidden}

    entry = build("mlp columns", seed=1)
    model = entry.model
    model.classifier = Head().double()
    FeatureSurgery(model, "classifier", tasks=TASKS, output="logits")
    output = model(entry.inputs)
    (sum(losses_of(named_outputs(output["logits"])).values()) + output["hidden"].square().sum()).backward()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    feature = twin.feature_map(entry.inputs)
    output = twin.classifier(feature)
    losses = losses_of(named_outputs(output["logits"]))
    gradients = [torch.autograd.grad(loss, feature, retain_graph=True)[0] for loss in losses.values()]
    (extra,) = torch.autograd.grad(output["hidden"].square().sum(), feature, retain_graph=True)
    for ours, parameter in zip(model.backbone.parameters(), twin.backbone.parameters()):
        (wanted,) = torch.autograd.grad(feature, parameter, pcgrad(gradients) + extra, retain_graph=True)
        torch.testing.assert_close(ours.grad, wanted)


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
    entry = build("tanh heads", seed=1)
    regularizer = SaliencyRegularizer(entry.model, "heads", surgery=PCGrad())
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
    assert not [found for found in gc.get_objects() if type(found) is GradientFork]


def test_copies_are_not_attached() -> None:
    entry = build("tanh heads")
    surgery = FeatureSurgery(entry.model, "heads")
    sum(losses_of(entry.model(entry.inputs)).values()).backward()
    twin = copy.deepcopy(surgery)
    assert "attached to no model" in repr(twin)
    assert "heads" in repr(surgery)
    copied = copy.deepcopy(entry.model)
    assert not any(module._forward_pre_hooks for module in copied.modules())
    assert torch.equal(twin.state_dict()["weighting.calls"], torch.tensor(1))


# State.


def test_resumes_bit_for_bit() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, SaliencyRegularizer]:
        model = build("tanh heads", seed=1).model
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        return (
            model,
            optimizer,
            SaliencyRegularizer(model, "heads", strength=0.1, optimizer=optimizer, surgery=PCGrad(7)),
        )

    def train(parts: tuple, steps: range) -> None:
        model, optimizer, regularizer = parts
        for step in steps:
            torch.manual_seed(step)
            inputs = torch.randn(6, 5, dtype=torch.float64)
            optimizer.zero_grad()
            (sum(losses_of(model(inputs), step).values()) + regularizer()).backward()
            optimizer.step()

    whole, first, second = make(), make(), make()
    train(whole, range(12))
    train(first, range(6))
    for old, new in zip(first, second):
        new.load_state_dict(old.state_dict())
    assert "surgery.weighting.calls" in first[2].state_dict()
    train(second, range(6, 12))
    for name, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name]), name
    assert torch.equal(whole[2].relations.matrix(), second[2].relations.matrix())


def test_the_global_generator_is_left_alone() -> None:
    entry = build("tanh heads")
    FeatureSurgery(entry.model, "heads")
    before = torch.get_rng_state()
    sum(losses_of(entry.model(entry.inputs)).values()).backward()
    assert torch.equal(before, torch.get_rng_state())


def test_state_with_and_without_surgery() -> None:
    def make(**options: object) -> SaliencyRegularizer:
        return SaliencyRegularizer(build("tanh heads").model, "heads", **options)

    without, with_surgery = make(), make(surgery=PCGrad(3))
    with_surgery.load_state_dict(without.state_dict())  # surgery that is new in a resumed run
    with pytest.raises(StateMismatchError, match="Build it with surgery="):
        without.load_state_dict(with_surgery.state_dict())
    other = make(surgery=PCGrad(4))
    other.load_state_dict(with_surgery.state_dict())
    assert torch.equal(other.surgery.weighting.order(5), PCGrad(3).order(5))


# What a review found.


class Tail(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.layers, self.function = mlp(nn.Tanh()), function

    def forward(self, feature: Tensor) -> Tensor:
        return self.function(self.layers(feature))


def with_heads(make: object, seed: int = 1) -> tuple[nn.Module, Tensor]:
    entry = build("tanh heads", seed)
    torch.manual_seed(seed)
    entry.model.heads = nn.ModuleDict({task: make() for task in TASKS}).double()
    return entry.model, entry.inputs


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh, torch.exp])
def test_heads_whose_last_operation_saves_its_result(function: object) -> None:
    """The penalty sends a gradient to such an output, which is not one of the losses."""
    model, inputs = with_heads(lambda: Tail(function))
    expected = slow_step(model, inputs, losses_of, pcgrad, 3.0)
    regularizer = SaliencyRegularizer(
        model, "heads", strength=3.0, relations=RelationWeights(3, "fixed"), surgery=PCGrad()
    )
    (sum(losses_of(model(inputs)).values()) + regularizer()).backward()
    assert_gradients(model, expected)


def test_hooks_of_the_user_on_an_output_count() -> None:
    entry = build("tanh heads", seed=1)
    regularizer = SaliencyRegularizer(
        entry.model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), surgery=PCGrad()
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
        model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), cross_sample="ignore", surgery=PCGrad()
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


def hooked(x: Tensor) -> Tensor:
    view = x.view_as(x)
    view.register_hook(lambda gradient: 0.1 * gradient)
    return view


@pytest.mark.parametrize("change", [Reverse.apply, lambda x: x.detach().requires_grad_(), hooked])
@pytest.mark.parametrize("at", [0, 1])
def test_what_changes_a_gradient_in_front_of_a_head_is_refused(change: object, at: int) -> None:
    model = build("tanh heads").model
    model.from_feature = lambda feature: {
        task: head(change(feature) if TASKS.index(task) == at else feature) for task, head in model.heads.items()
    }
    FeatureSurgery(model, "heads")
    with pytest.raises(CaptureError, match="gradient reversal"):
        model(torch.randn(4, 5, dtype=torch.float64))


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


class ListHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.layer(maps[0].tanh())


class SecondArgumentHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, condition: Tensor, feature: Tensor) -> Tensor:
        return self.layer(feature.tanh()) * condition.sum()


@pytest.mark.parametrize(
    ("head", "call"),
    [
        (ListHead, lambda head, feature: head([feature])),
        (SecondArgumentHead, lambda head, feature: head(torch.ones(2, dtype=torch.float64), feature)),
    ],
)
def test_what_the_heads_share_in_another_place(head: type[nn.Module], call: object) -> None:
    model, inputs = with_heads(head, seed=3)
    model.from_feature = lambda feature: {task: call(each, feature) for task, each in model.heads.items()}
    expected = slow_step(model, inputs, losses_of, pcgrad)
    assert expected.conflicts > 0
    with FeatureSurgery(model, "heads"), pytest.raises(CaptureError, match="what the heads share"):
        model(inputs)
    surgery = FeatureSurgery(model, "heads", feature="backbone")
    sum(losses_of(model(inputs)).values()).backward()
    assert surgery.report is not None
    assert_gradients(model, expected)


def test_a_second_tensor_that_is_not_named_is_told() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, feature: Tensor, other: Tensor) -> Tensor:
            return self.layer(feature + other)

    model, inputs = with_heads(Head)
    model.from_feature = lambda feature: {task: head(feature, 2 * feature) for task, head in model.heads.items()}
    FeatureSurgery(model, "heads")
    with pytest.warns(UserWarning, match="also reads a tensor"):
        model(inputs)
    model(inputs)  # once


@pytest.mark.parametrize("name", ["linear columns", "mlp columns"])
def test_columns_one_after_the_other_are_refused(name: str) -> None:
    entry = build(name, seed=1)
    FeatureSurgery(entry.model, **entry.options)
    outputs = entry.model(entry.inputs)
    outputs[:, 0].sum().backward(retain_graph=True)
    with pytest.raises(SurgeryError, match=r"\['first'\] and of \['second'\].*with surgery.passing"):
        outputs[:, 1].sum().backward(retain_graph=True)


def test_single_tasks_can_be_looked_at() -> None:
    entry = build("tanh heads", seed=1)
    expected = slow_step(entry.model, entry.inputs, losses_of, pcgrad)
    surgery = FeatureSurgery(entry.model, "heads")
    losses = losses_of(entry.model(entry.inputs))
    weight = entry.model.backbone[0].weight
    with surgery.passing():
        alone = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses.values()]
    assert len(alone) == 3
    sum(losses.values()).backward()
    assert_gradients(entry.model, expected)


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.classifier = nn.Linear(5, 6), nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.backbone(x).tanh())


@pytest.mark.parametrize("height", [2, 3])
def test_columns_of_a_channels_last_map(height: int) -> None:
    torch.manual_seed(2)
    model, inputs = ChannelsLast().double(), torch.randn(2, height, 2, 5, dtype=torch.float64)
    targets = torch.randn(2, height, 2, 3, dtype=torch.float64)
    twin = copy.deepcopy(model)
    feature = twin.backbone(inputs).tanh()
    error = (twin.classifier(feature) - targets).square().mean((0, 1, 2))
    task_gradients = [torch.autograd.grad(one, feature, retain_graph=True)[0] for one in error]
    combined = pcgrad(task_gradients)
    assert (combined - sum(task_gradients)).abs().max() > 1e-5
    (wanted,) = torch.autograd.grad(feature, twin.backbone.weight, combined)
    FeatureSurgery(model, "classifier", tasks=TASKS, channel_axis=-1)
    (model(inputs) - targets).square().mean((0, 1, 2)).sum().backward()
    torch.testing.assert_close(model.backbone.weight.grad, wanted)


def test_the_report_is_not_that_of_an_earlier_step() -> None:
    entry = build("tanh heads", seed=1)
    regularizer = SaliencyRegularizer(entry.model, "heads", surgery=PCGrad())
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
        entry.model, "heads", strength=0.7, relations=RelationWeights(3, "fixed"), surgery=PCGrad()
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


# Bad input.


def test_tasks_one_after_the_other_are_refused() -> None:
    entry = build("tanh heads", seed=1)
    FeatureSurgery(entry.model, "heads")
    losses = losses_of(entry.model(entry.inputs))
    losses["first"].backward(retain_graph=True)
    with pytest.raises(SurgeryError, match=r"\['first'\] and of \['second'\] arrived in separate backward passes"):
        losses["second"].backward(retain_graph=True)
    # Looking at single tasks and then training on all of them is fine.
    sum(losses.values()).backward()


def test_heads_that_read_different_tensors_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

        def forward(self, x: Tensor) -> list[Tensor]:
            feature = self.backbone(x)
            return [head(nn.functional.dropout(feature)) for head in self.heads]

    model = Model()
    FeatureSurgery(model, "heads")
    with pytest.raises(CaptureError, match="all heads must read the same tensors"):
        model(torch.randn(3, 4))


def test_in_place_heads_are_refused() -> None:
    entry = build("in-place heads")
    FeatureSurgery(entry.model, "heads")
    with pytest.raises(CaptureError, match="inplace=False"):
        entry.model(entry.inputs)


@pytest.mark.parametrize(
    ("weighting", "error", "text"),
    [
        (PCGrad, WrongTypeError, "found the class PCGrad"),
        (0.5, WrongTypeError, "found float"),
        (lambda gramian: 1.0, WrongTypeError, "returned float"),
        (lambda gramian: gramian, ShapeError, r"returned the shape \[3, 3\]"),
        (lambda gramian: gramian[0, 1:], ShapeError, r"returned the shape \[2\]"),
    ],
)
def test_weightings_that_cannot_work(weighting: object, error: type[Exception], text: str) -> None:
    entry = build("tanh heads")
    with pytest.raises(error, match=text):
        FeatureSurgery(entry.model, "heads", weighting=weighting)
    assert not any(module._forward_pre_hooks for module in entry.model.modules())


def test_an_aggregator_that_is_no_weighted_sum() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    entry = build("tanh heads")
    with pytest.raises(WrongTypeError, match="no weighted sum"):
        FeatureSurgery(entry.model, "heads", weighting=aggregation.GradDrop())


def test_arguments_that_do_not_fit() -> None:
    entry = build("tanh heads")
    model = entry.model
    with pytest.raises(ConfigurationError, match="Both at once"):
        SaliencyRegularizer(model, "heads", surgery=FeatureSurgery(build("tanh heads").model, "heads"))
    with pytest.raises(ConfigurationError, match="can only be used with a model"):
        SaliencyRegularizer(None, tasks=["a", "b"], surgery=PCGrad())
    with pytest.raises(ConfigurationError, match="LBFGS evaluates a closure"):
        SaliencyRegularizer(model, "heads", surgery=PCGrad(), optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ConfigurationError, match="LBFGS evaluates a closure"):
        FeatureSurgery(model, "heads", optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(WrongTypeError, match=r"torch\.nn\.Module"):
        FeatureSurgery(model.parameters(), "heads")
    with pytest.raises(WrongTypeError, match="seed must be an int"):
        PCGrad(seed=0.5)
    with pytest.raises(ConfigurationError, match="64 bits"):
        PCGrad(seed=2**70)
    regularizer = SaliencyRegularizer(model, "heads", surgery=PCGrad())
    feature = torch.randn(3, 6, requires_grad=True)
    with pytest.raises(ConfigurationError, match="cannot be used under surgery"):
        regularizer(outputs={"first": feature.sum(1), "second": feature.sum(1)}, features=feature)
    assert "PCGrad (feature)" in regularizer.describe()


def test_columns_that_cannot_be_watched() -> None:
    with pytest.raises(ConfigurationError, match="a function of what it returns"):
        FeatureSurgery(build("mlp columns").model, "classifier", tasks=TASKS, output=lambda output: output)
    model = build("mlp columns").model
    FeatureSurgery(model, "classifier", tasks=TASKS)
    model.classifier[2] = nn.Linear(4, 2).double()
    with pytest.raises(TaskError, match="2 columns for 3 tasks"):
        model(torch.randn(4, 5, dtype=torch.float64))


# Mixed precision.


def float_model(classes: int = 1) -> nn.Module:
    torch.manual_seed(0)
    entry = build("tanh heads")
    entry.model.heads = nn.ModuleDict({task: mlp(nn.Tanh(), classes) for task in TASKS})
    return entry.model.float()


@pytest.mark.parametrize("classes", [1, 3])  # the two ways around the fork
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 6e-3)])
def test_autocast_and_scaler_give_the_update_of_float32(dtype: torch.dtype, tolerance: float, classes: int) -> None:
    torch.manual_seed(1)
    inputs = torch.randn(16, 5)

    def update(autocast: bool) -> tuple[Tensor, float]:
        model = float_model(classes)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        regularizer = SaliencyRegularizer(
            model, "heads", strength=0.5, scalarize="logsumexp", optimizer=optimizer, surgery=PCGrad()
        )
        scaler = torch.amp.GradScaler("cpu", enabled=autocast and dtype == torch.float16, init_scale=1024.0)
        before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            losses = losses_of({task: output.double() for task, output in model(inputs).items()})
            loss = sum(losses.values()).float() + regularizer()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        return after - before, regularizer.report.surgery.conflicts

    exact, conflicts = update(autocast=False)
    found, _ = update(autocast=True)
    assert conflicts > 0
    assert (found - exact).norm() / exact.norm() < tolerance


def test_an_overflow_in_one_task_skips_the_step_and_trains_on() -> None:
    for weighting in (PCGrad(), lambda gramian: torch.ones(len(gramian))):
        model = float_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regularizer = SaliencyRegularizer(model, "heads", strength=0.5, optimizer=optimizer, surgery=weighting)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for step in range(3):
            before = [parameter.detach().clone() for parameter in model.parameters()]
            optimizer.zero_grad()
            losses = losses_of({task: output.double() for task, output in model(torch.randn(8, 5)).items()})
            factor = float("inf") if step == 1 else 1.0
            loss = (losses["first"] + factor * losses["second"] + losses["third"]).float() + regularizer()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
            assert all(moved) if step != 1 else not any(moved)
        assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
        assert int(regularizer.steps) == 2
