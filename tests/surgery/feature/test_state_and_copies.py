"""What surgery at the feature map keeps: states, copies, random numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from saliency_reg import FeatureSurgery, PCGrad, SaliencyRegularizer
from saliency_reg.errors import StateMismatchError
from tests.support.zoo import build

from .support import losses_of


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


def test_resumes_bit_for_bit() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, SaliencyRegularizer]:
        model = build("tanh heads", seed=1).model
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        return (
            model,
            optimizer,
            SaliencyRegularizer(model, "heads", strength=0.1, optimizer=optimizer, surgery=PCGrad(7), metric="l1"),
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
        return SaliencyRegularizer(build("tanh heads").model, "heads", **{"strength": 0.1, "metric": "l1", **options})

    without, with_surgery = make(), make(surgery=PCGrad(3))
    with_surgery.load_state_dict(without.state_dict())  # surgery that is new in a resumed run
    with pytest.raises(StateMismatchError, match="Build it with surgery="):
        without.load_state_dict(with_surgery.state_dict())
    other = make(surgery=PCGrad(4))
    other.load_state_dict(with_surgery.state_dict())
    assert torch.equal(other.surgery.weighting.order(5), PCGrad(3).order(5))
