"""What a training comes to: which groups are found, and what sharing does to it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer, SelectiveSharing, share_estimators

from .support import TASKS, TRUE_GROUPS, MakeOptimizer, Model, adamw, batch, losses, same, sgd, train

pytestmark = pytest.mark.usefixtures("float64")
both = pytest.mark.parametrize("make", [sgd, adamw])


@both
@pytest.mark.parametrize("same_start", [True, False])
def test_copies_of_three_tasks_end_in_three_groups(make: MakeOptimizer, same_start: bool) -> None:
    """The output layers start differently, and have different numbers of outputs."""
    model = Model(outputs=lambda task: 1 + int(task[1]))
    optimizer = make(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer, same_start=same_start)
    train(model, optimizer, range(100))
    assert sharing.groups(theta=0.3) == TRUE_GROUPS
    assert sharing.share(sharing.groups(theta=0.3)) == TRUE_GROUPS
    estimators = {id(model.heads[task][0]) for task in TASKS}
    assert len(estimators) == 3
    assert len({id(model.heads[task][2]) for task in TASKS}) == 9
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in optimizer.state} == held
    train(model, optimizer, range(100, 150))
    assert sharing.groups(theta=0.3) == TRUE_GROUPS
    assert sharing.groups(theta=3.0) == (TASKS,)
    found = sharing.similarity()
    letters = torch.tensor([ord(task[0]) for task in TASKS])
    alike = letters.unsqueeze(0) == letters.unsqueeze(1)
    assert bool((found[alike] > 1 - 1e-12).all())
    assert bool((found[~alike] < 0.9).all())


@both
def test_copies_are_found_by_plain_gradients_where_all_starts_alike(make: MakeOptimizer) -> None:
    model = Model()
    for task in TASKS:
        model.heads[task][2].load_state_dict(model.heads["a0"][2].state_dict())
    optimizer = make(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer, compare="gradients", same_start=True)
    train(model, optimizer, range(50))
    assert sharing.groups(theta=0.1) == TRUE_GROUPS


def test_variance_makes_groups_of_distinct_tasks() -> None:
    model = Model()
    optimizer = adamw(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
    train(model, optimizer, range(100))
    groups = sharing.groups(theta=0.3, directive="variance")
    assert [sorted(task[0] for task in group) for group in groups] == [["a", "b", "c"]] * 3


@both
def test_theta_zero_is_the_multi_head_training(make: MakeOptimizer) -> None:
    model = Model()
    plain = copy.deepcopy(model)
    plain_optimizer, optimizer = make(plain), make(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
    train(model, optimizer, range(5))
    assert sharing.share(sharing.groups(theta=0)) == tuple((task,) for task in TASKS)
    train(model, optimizer, range(5, 10))
    train(plain, plain_optimizer, range(10))
    assert same(model, plain)
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@both
@pytest.mark.parametrize("directive", ["similarity", "variance"])
def test_theta_above_two_leaves_one_estimator(make: MakeOptimizer, directive: str) -> None:
    model = Model()
    optimizer = make(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
    train(model, optimizer, range(3))
    assert sharing.share(sharing.groups(theta=2.01, directive=directive)) == (TASKS,)
    assert len({id(model.heads[task][0]) for task in TASKS}) == 1
    train(model, optimizer, range(3, 6))
    assert sharing.similarity().tolist() == torch.ones(9, 9).tolist()
    assert sharing.groups(theta=0) == (TASKS,)


def test_gradients_are_summed_per_task() -> None:
    model = Model()
    optimizer = sgd(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)

    def absent(step: int) -> Sequence[str]:
        return [task for number, task in enumerate(TASKS) if (step + number) % 3 == 0 or task == "c2"]

    expected = torch.zeros(9, 6, 8)
    counts = torch.zeros(9, dtype=torch.int64)
    for step in range(5):
        x = batch(step)
        for task, loss in losses(model(x), x, absent(step)).items():
            expected[TASKS.index(task)] += torch.autograd.grad(loss, model.heads[task][0].weight)[0]
            counts[TASKS.index(task)] += 1
        train(model, optimizer, range(step, step + 1), absent)
    torch.testing.assert_close(sharing.gathered.gradients, expected, rtol=0, atol=1e-10)
    assert sharing.gathered.batches.tolist() == counts.tolist()
    assert int(sharing.gathered.steps) == 5
    rows = torch.stack([(one.T @ one).flatten() for one in expected[:8]])
    rows = rows / rows.norm(dim=1, keepdim=True)
    exact = SelectiveSharing(model, heads="heads", energy=1.0)
    exact.gathered.load_state_dict(sharing.gathered.state_dict())
    torch.testing.assert_close(exact.similarity()[:8, :8], rows @ rows.T, rtol=0, atol=1e-10)
    assert exact.similarity()[8].isnan().all()
    assert exact.similarity()[:, 8].isnan().all()


def test_tasks_without_labels_stay_alone() -> None:
    model = Model()
    optimizer = adamw(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
    train(model, optimizer, range(100), lambda step: ("a1", "c0"))
    expected = (("a0", "a2"), ("b0", "b1", "b2"), ("c0",), ("a1",), ("c1", "c2"))
    assert sharing.groups(theta=0.3) == expected
    assert sharing.groups(theta=3.0) == (tuple(task for task in TASKS if task not in ("a1", "c0")), ("c0",), ("a1",))
    sharing.share(sharing.groups(theta=0.3))
    train(model, optimizer, range(100, 103))
    assert not sharing.similarity().isnan().any()


def gradients_apart(model: Model, x: Tensor, tasks: Sequence[str]) -> list[Tensor]:
    """Of each task, that of the weight of the estimator, without hooks on it."""
    return [torch.autograd.grad(losses(model(x), x)[task], model.heads[task][0].weight)[0] for task in tasks]


def test_a_shared_estimator_has_the_mean_gradient_and_keeps_its_state() -> None:
    model = Model()
    optimizer = sgd(model)
    train(model, optimizer, range(4))
    kept, momentum = (
        model.heads["a0"][0].weight,
        optimizer.state[model.heads["a0"][0].weight]["momentum_buffer"].clone(),
    )
    before = {task: output.clone() for task, output in model(batch(0)).items()}
    sharing = share_estimators(model, [TASKS[:3], TASKS[3:]], heads="heads", optimizer=optimizer)
    after = model(batch(0))
    assert {task for task in TASKS if torch.equal(before[task], after[task])} == {"a0", "a1"}
    assert model.heads["b0"][0].weight is kept
    assert torch.equal(optimizer.state[kept]["momentum_buffer"], momentum)
    x = batch(9)
    apart = torch.stack(gradients_apart(copy.deepcopy(model), x, TASKS[:3]))
    for size, groups in ((3, [TASKS[:3], TASKS[3:]]), (9, [TASKS])):
        sharing.share(groups)
        optimizer.zero_grad()
        torch.stack(list(losses(model(x), x).values())).sum().backward()
        if size == 3:
            torch.testing.assert_close(kept.grad, apart.mean(0), rtol=0, atol=1e-10)
    everything = torch.stack(gradients_apart(copy.deepcopy(model), x, TASKS))
    torch.testing.assert_close(kept.grad, everything.mean(0), rtol=0, atol=1e-10)


def test_the_medoid_survives() -> None:
    """Three tasks at 0, 20 and 40 degrees: the middle one."""
    model = nn.ModuleDict({task: nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1)) for task in "xyz"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sharing = SelectiveSharing(model, heads={task: task for task in "xyz"}, optimizer=optimizer, energy=1.0)
    for task, degrees in zip("xyz", (0.0, 40.0, 20.0)):
        angle = torch.deg2rad(torch.tensor(degrees))
        model[task][0].weight.grad = torch.stack([angle.cos(), angle.sin()]).unsqueeze(0)
    optimizer.step()
    kept = model["z"][0]
    sharing.share([list("xyz")])
    assert model["x"][0] is model["y"][0] is kept
    assert sharing.survivors.tolist() == [2, 2, 2]


def test_estimators_of_other_forms() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(4, 1)
            self.estimator = nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.estimator(x))

    model = nn.ModuleDict({task: Head() for task in "abc"})
    x = torch.randn(8, 2, 5, 5)
    for head in model.values():
        head(x)
    optimizer = sgd(model)
    sharing = SelectiveSharing(model, heads=["a", "b", "c"], estimators="estimator", optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        torch.stack([head(x).square().mean() for head in model.values()]).sum().backward()
        optimizer.step()
    assert sharing.gathered.gradients.shape == (3, 4, 2, 3, 3)
    assert sharing.groups(theta=3.0) == (("a", "b", "c"),)
    sharing.share([["a", "c"], ["b"]])
    assert model["a"].estimator is model["c"].estimator
    named = share_estimators(model, [list("abc")], estimators={task: f"{task}.estimator" for task in "abc"})
    assert model["b"].estimator is model["a"].estimator
    assert named.grouping == (("a", "b", "c"),)
    assert {hook.size for hook in model["a"].estimator[0].weight._backward_hooks.values()} == {3}


def test_heads_of_several_modules() -> None:
    model = nn.ModuleDict(
        {
            "first": nn.ModuleDict({task: nn.Linear(4, 3) for task in "ab"}),
            "last": nn.ModuleDict({task: nn.Linear(3, 2) for task in "ab"}),
        }
    )
    sharing = share_estimators(model, [("a", "b")], heads={task: [f"first.{task}", f"last.{task}"] for task in "ab"})
    assert model["first"]["a"] is model["first"]["b"]
    assert model["last"]["a"] is not model["last"]["b"]
    assert sharing.grouping == (("a", "b"),)


def test_the_regularizer_goes_on() -> None:
    model = Model(("a0", "b0", "c0"))
    optimizer = adamw(model)
    regularizer = SaliencyRegularizer(model, heads="heads", strength=0.1, optimizer=optimizer)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
    for step in range(4):
        x = batch(step)
        optimizer.zero_grad()
        own = losses(model(x), x)
        (torch.stack(list(own.values())).sum() + regularizer(losses=own)).backward()
        optimizer.step()
        if step == 1:
            sharing.share([["a0", "c0"], ["b0"]])
    assert int(sharing.gathered.steps) == 2
    assert model.heads["a0"][0] is model.heads["c0"][0]


def test_hooks_go_with_their_owner() -> None:
    model = Model()
    optimizer = sgd(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
    sharing.attach_optimizer(optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    sharing.remove()
    assert not optimizer._optimizer_step_post_hooks
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
    del sharing
    assert not optimizer._optimizer_step_post_hooks
