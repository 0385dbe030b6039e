"""What a training does around the penalty: skipped steps, resumption, copies, several processes."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import CaptureError, HeadPenalty, PCGrad, SaliencyRegularizer, StateMismatchError
from tests.support.two_processes import run_on_two_processes

from .support import TASKS, Heads, deep_heads, first_weights, linear_heads, make, steps_on

KINDS = ("lasso", "l21", "mean", "mrn", "mtrl")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def options_of(kind: str) -> dict[str, Any]:
    return {"update_steps": 3} if kind in ("mrn", "mtrl") else {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_the_loss_scale_skips_changes_nothing(kind: str) -> None:
    model = linear_heads()
    penalty, optimizer = make(model, kind, 0.5, **({"update_steps": 1} if options_of(kind) else {}))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, moved in ((math.inf, 0), (1.0, 1)):
        before, covariance = first_weights(model), copy.deepcopy(penalty.covariance)
        optimizer.zero_grad()
        loss = sum(output.square().mean() for output in model(torch.randn(5, 4)).values()) + penalty()
        scaler.scale(factor * loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert int(penalty.steps) == moved
        assert torch.equal(first_weights(model), before) == (not moved)
        if covariance is not None:
            assert torch.equal(penalty.covariance, covariance) == (not moved)


def test_accumulated_micro_batches_are_one_step() -> None:
    models = [linear_heads() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, parts in zip(models, (1, 3)):
        penalty, optimizer = make(model, "lasso", 0.5)
        mean, _ = make(model, "mean", 0.5)
        for _ in range(parts):
            ((model(torch.ones(2, 4))["a"].sum() + penalty() + mean()) / parts).backward()
        optimizer.step()
        assert int(penalty.steps) == 1
    torch.testing.assert_close(*map(first_weights, models))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_goes_on_bit_for_bit(kind: str) -> None:
    model = deep_heads()
    penalty, optimizer = make(model, kind, 0.02, **options_of(kind))
    steps_on(model, optimizer, penalty, range(4))
    file = io.BytesIO()
    torch.save([each.state_dict() for each in (model, optimizer, penalty)], file)
    expected = steps_on(model, optimizer, penalty, range(4, 10))
    torch.manual_seed(5)
    again = deep_heads()
    other, its_optimizer = make(again, kind, 0.02, **options_of(kind))
    file.seek(0)
    for each, state in zip((again, its_optimizer, other), torch.load(file)):
        each.load_state_dict(state)
    assert torch.equal(torch.stack(expected), torch.stack(steps_on(again, its_optimizer, other, range(4, 10))))
    for name, value in penalty.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("kind", KINDS)
def test_no_strength_is_no_penalty_bit_for_bit(kind: str) -> None:
    models = [deep_heads() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    penalty, optimizer = make(models[0], kind, 0.0)
    losses = steps_on(models[0], optimizer, penalty, range(5), tasks=("a", "b"))
    plain = steps_on(models[1], torch.optim.SGD(models[1].parameters(), lr=0.1), None, range(5), tasks=("a", "b"))
    assert torch.equal(torch.stack(losses), torch.stack(plain))
    for own, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(own, other)
        assert (own.grad is None) == (other.grad is None)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_tasks_without_labels_are_penalised(kind: str) -> None:
    model = linear_heads()
    penalty, optimizer = make(model, kind, 0.05)
    before = first_weights(model)
    steps_on(model, optimizer, penalty, range(1), tasks=("a", "b"))
    assert not torch.equal(first_weights(model)[2], before[2])


def test_frozen_heads_stay() -> None:
    for kind in ("lasso", "l21"):
        model = linear_heads()
        penalty, optimizer = make(model, kind, 1.0, lr=0.5)
        model.heads["b"].requires_grad_(False)
        before = first_weights(model)
        optimizer.step()
        after = first_weights(model)
        assert torch.equal(after[1], before[1])
        rows = before[[0, 2]]
        shrunk = rows.sign() * (rows.abs() - 0.5).clamp(min=0)
        expected = shrunk if kind == "lasso" else rows * (1 - 0.5 / rows.norm(dim=0)).clamp(min=0)
        torch.testing.assert_close(after[[0, 2]], expected)
        model.heads.requires_grad_(False)
        optimizer.step()
        assert torch.equal(first_weights(model), after)
        assert int(penalty.steps) == 2


def test_copies_and_pickles_keep_the_state_and_are_attached_to_nothing() -> None:
    model = linear_heads()
    penalty, optimizer = make(model, "mrn", update_steps=1)
    steps_on(model, optimizer, penalty, range(2))
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert torch.equal(twin.relations, penalty.relations)
        assert not twin.follows_optimizer
        assert "attached to no model" in repr(twin)
        with pytest.raises(CaptureError, match="attached to no model"):
            twin()
    steps_on(model, optimizer, penalty, range(1))
    assert (int(twin.steps), int(penalty.steps)) == (2, 3)
    copy.deepcopy(model)
    copy.deepcopy(optimizer)


def test_it_lets_go() -> None:
    model = linear_heads()
    penalty, optimizer = make(model, "lasso", 100.0)
    hooks = len(optimizer._optimizer_step_post_hooks)
    with penalty:
        assert penalty.follows_optimizer
    assert len(optimizer._optimizer_step_post_hooks) == hooks - 1
    optimizer.step()
    assert first_weights(model).ne(0).all()
    with pytest.raises(CaptureError, match="removed"):
        penalty()
    penalty.remove()
    penalty, optimizer = make(model, "lasso", 100.0)
    del penalty
    gc.collect()
    optimizer.step()
    assert first_weights(model).ne(0).all()
    assert not optimizer._optimizer_step_post_hooks


def test_another_optimizer_takes_over() -> None:
    model = linear_heads()
    penalty, first = make(model, "lasso", 100.0)
    second = torch.optim.Adam(model.parameters(), lr=1.0)
    penalty.attach_optimizer(second)
    first.step()
    assert int(penalty.steps) == 0
    second.step()
    assert penalty.zeros == 1


def test_states_of_others_are_refused_as_a_whole() -> None:
    penalty, _ = make(linear_heads(), "mrn")
    before = copy.deepcopy(penalty.state_dict())
    others = {
        "kind='mtrl'": make(linear_heads(), "mtrl")[0].state_dict(),
        "['x', 'y']": make(linear_heads(tasks="xy"), "mrn")[0].state_dict(),
        "['b', 'a', 'c']": make(linear_heads(tasks="bac"), "mrn")[0].state_dict(),
        "positive definite": {**before, "steps": torch.tensor(7), "covariance": -torch.eye(3, dtype=torch.float64)},
        "lacks": {"steps": torch.tensor(7)},
        "shape": {**before, "covariance": torch.eye(2, dtype=torch.float64)},
    }
    for words, state in others.items():
        with pytest.raises(StateMismatchError) as caught:
            penalty.load_state_dict(state)
        assert words in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in penalty.state_dict().items())


def test_it_works_beside_the_saliency_penalty_and_surgery() -> None:
    model = deep_heads()
    penalty, optimizer = make(model, "l21", 1.0)
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, optimizer=optimizer, surgery=PCGrad())
    for _ in range(20):
        optimizer.zero_grad()
        losses = {task: output.square().mean() for task, output in model(torch.randn(8, 4)).items()}
        (sum(losses.values()) + regularizer(losses=losses) + penalty()).backward()
        optimizer.step()
    assert int(penalty.steps) == int(regularizer.steps) == 20
    assert penalty.zeros > 0


def train_in_processes(rank: int, kind: str, shares: list[tuple[int, int]], wrapped: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model: nn.Module = Heads(lambda task: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)))
    inner = model
    if wrapped:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    penalty = HeadPenalty(model, "heads", kind=kind, strength=0.1, optimizer=optimizer, **options_of(kind))
    begin, end = shares[rank]
    for step in range(7):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))[begin:end]
        optimizer.zero_grad()
        (sum((model(x)[task] - 1).square().mean() for task in TASKS) + penalty()).backward()
        optimizer.step()
    return [first.detach().clone() for first in (*inner.parameters(), *penalty.buffers())]


@pytest.mark.parametrize("kind", ["l21", "mtrl"])
def test_two_processes_train_as_one_does(kind: str) -> None:
    first, second = run_on_two_processes(train_in_processes, kind, [(0, 4), (4, 8)], True)
    alone = train_in_processes(0, kind, [(0, 8)], False)
    for own, other, expected in zip(first, second, alone):
        assert torch.equal(own, other)
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
