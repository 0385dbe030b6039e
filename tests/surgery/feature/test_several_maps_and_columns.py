"""Surgery at several feature maps, and in front of one head with a column for each task."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, PCGrad, RelationWeights, SaliencyRegularizer
from saliency_reg.errors import ConfigurationError, SurgeryError, TaskError
from saliency_reg.regularizer.sample_mixing import SampleMixing
from saliency_reg.surgery.feature import penalty_bypass
from saliency_reg.surgery.feature.penalty_bypass import replayed
from tests.reference.slow_fork import slow_step
from tests.support.zoo import TASKS, build

from .support import assert_gradients, losses_of, named_outputs, pcgrad


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
            model,
            strength=strength,
            relations=RelationWeights(3, "fixed"),
            surgery=PCGrad(),
            **{"metric": "l1", **options},
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
        regularizer = SaliencyRegularizer(entry.model, "heads", pool=pool, strength=0.7, surgery=PCGrad(), metric="l1")
        loss = sum(losses_of(entry.model(entry.inputs)).values())
        if replay:
            monkeypatch.setattr(SampleMixing, "are_samples_apart", lambda *args, **kwargs: False)
        (loss + regularizer()).backward()
        assert len(calls) == int(replay or (name == "pooling heads" and pool == "sum"))
        found.append({key: parameter.grad for key, parameter in entry.model.named_parameters()})
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-11, atol=1e-12)


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


def test_columns_that_cannot_be_watched() -> None:
    with pytest.raises(ConfigurationError, match="a function of what it returns"):
        FeatureSurgery(build("mlp columns").model, "classifier", tasks=TASKS, output=lambda output: output)
    model = build("mlp columns").model
    FeatureSurgery(model, "classifier", tasks=TASKS)
    model.classifier[2] = nn.Linear(4, 2).double()
    with pytest.raises(TaskError, match="2 columns for 3 tasks"):
        model(torch.randn(4, 5, dtype=torch.float64))
