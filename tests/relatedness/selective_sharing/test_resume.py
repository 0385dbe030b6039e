"""A training that goes on from a checkpoint is the one that was not interrupted, to the bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from saliency_reg import CaptureError, SelectiveSharing, StateMismatchError

from .support import TASKS, MakeOptimizer, Model, adamw, batch, same, sgd, train

pytestmark = pytest.mark.usefixtures("float64")
GROUPS = [["b0", "a1", "c2"], ["a0", "b1"], ["c0"], ["c1"], ["a2"], ["b2"]]


def build(make: MakeOptimizer) -> tuple[Model, torch.optim.Optimizer, SelectiveSharing]:
    model = Model()
    optimizer = make(model)
    return model, optimizer, SelectiveSharing(model, heads="heads", optimizer=optimizer)


def stored(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_resumed_training_is_equal_to_the_bit(make: MakeOptimizer) -> None:
    model, optimizer, sharing = build(make)
    train(model, optimizer, range(6))
    sharing.share(GROUPS)  # medoids survive, not the first ones
    assert sharing.survivors.tolist() != sorted(sharing.survivors.tolist())
    train(model, optimizer, range(6, 9))  # and a window is open
    saved = stored({"sharing": sharing.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()})

    other, other_optimizer, other_sharing = build(make)
    other_sharing.load_state_dict(saved["sharing"])
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    assert other_sharing.grouping == sharing.grouping
    assert other.heads["b0"][0] is other.heads["a1"][0]
    assert len(list(other.parameters())) == len(list(model.parameters()))
    for each, own in ((model, optimizer), (other, other_optimizer)):
        train(each, own, range(9, 12))
    assert same(model, other)
    assert torch.equal(sharing.gathered.gradients, other_sharing.gathered.gradients)
    assert int(other_sharing.gathered.steps) == 6
    groups = sharing.share(sharing.groups(theta=0.5))
    assert other_sharing.share(other_sharing.groups(theta=0.5)) == groups
    assert len(groups) < len(GROUPS)
    for each, own in ((model, optimizer), (other, other_optimizer)):
        train(each, own, range(12, 15))
    assert same(model, other)


def test_it_may_be_a_part_of_the_model() -> None:
    def with_sharing() -> Model:
        model = Model()
        optimizer = sgd(model)
        model.sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
        model.optimizer = optimizer
        return model

    model = with_sharing()
    train(model, model.optimizer, range(3))
    model.sharing.share(GROUPS)
    other = with_sharing()
    other.load_state_dict(stored(model.state_dict()))
    assert other.sharing.grouping == model.sharing.grouping
    assert same(model, other)
    for each in (model, other):
        each.optimizer.state.clear()
        train(each, each.optimizer, range(3, 6))
    assert same(model, other)


def test_state_that_does_not_fit_is_refused() -> None:
    sharing = build(sgd)[2]
    sharing.share(GROUPS)
    state = sharing.state_dict()
    other, _, other_sharing = build(sgd)
    other_sharing.share([["a0", "c2"], *[[task] for task in TASKS if task not in ("a0", "c2")]])
    before = copy.deepcopy(other.state_dict()), other_sharing.grouping, len(list(other.parameters()))
    with pytest.raises(StateMismatchError, match=r"cannot be parted\. Build the model anew"):
        other_sharing.load_state_dict(state)
    renamed = SelectiveSharing(Model([f"{task}x" for task in TASKS]), heads="heads").state_dict()
    with pytest.raises(StateMismatchError, match="the tasks"):
        other_sharing.load_state_dict(renamed)
    fresh = build(sgd)[2]
    with pytest.raises(StateMismatchError, match="no grouping"):
        fresh.load_state_dict({**state, "survivors": torch.tensor([1, 2, 0, 3, 4, 5, 6, 7, 8])})
    with pytest.raises(StateMismatchError, match="shape"):
        fresh.load_state_dict({**state, "gathered.gradients": torch.zeros(9, 7, 8)})
    with pytest.raises(StateMismatchError, match="lacks"):
        fresh.load_state_dict({key: value for key, value in state.items() if key != "gathered.steps"})
    assert fresh.grouping == tuple((task,) for task in TASKS)
    after = other.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before[0].items())
    assert (other_sharing.grouping, len(list(other.parameters()))) == before[1:]
    fresh.load_state_dict(state)
    assert fresh.grouping == sharing.grouping


def test_a_copy_is_attached_to_nothing() -> None:
    model, optimizer, sharing = build(sgd)
    train(model, optimizer, range(2))
    state = sharing.state_dict()
    alone = copy.deepcopy(sharing)
    alone.load_state_dict(state)
    assert torch.equal(alone.gathered.gradients, sharing.gathered.gradients)
    with pytest.raises(CaptureError, match="attached to no model"):
        alone.groups()
    sharing.share(GROUPS)
    with pytest.raises(CaptureError, match="attached to no model"):
        alone.load_state_dict(sharing.state_dict())
    copied = copy.deepcopy(model)
    assert copied.heads["b0"][0] is copied.heads["a1"][0]
    # Copies of parameters have no hooks: whoever trains the copy attaches to it.
    own = sgd(copied)
    attached = SelectiveSharing(copied, heads="heads", optimizer=own)
    assert attached.grouping == sharing.grouping
    for each, its_optimizer in ((model, sgd(model)), (copied, own)):
        train(each, its_optimizer, range(3))
    assert same(model, copied)


def test_moved_modules_keep_what_was_gathered() -> None:
    model, optimizer, sharing = build(sgd)
    train(model, optimizer, range(2))
    before = sharing.gathered.gradients.clone()
    nn.ModuleList([sharing]).to(torch.bfloat16)
    assert torch.equal(sharing.gathered.gradients, before)
    assert bool(batch(0).any())
