"""What was asked for and cannot act is told once, with what to do; what acts is not."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, PCGrad, SaliencyRegularizer
from saliency_reg.regularizer import reminders
from saliency_reg.regularizer.strength import USEFUL_SHARES
from saliency_reg.surgery.feature import combiner


@pytest.fixture(autouse=True)
def _ten_for_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages have the numbers that hold outside of these tests."""
    monkeypatch.setattr(reminders, "CALLS", 10)
    monkeypatch.setattr(reminders, "ALONE", 4)
    monkeypatch.setattr(combiner, "FORWARDS", 10)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(4, 6)
        self.heads = nn.ModuleDict({t: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)) for t in "abc"})

    def forward(self, x: Tensor, tasks: str = "abc") -> dict[str, Tensor]:
        feature = self.backbone(x).tanh()
        return {task: self.heads[task](feature) for task in tasks}


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([output.square().mean() for output in outputs.values()]).sum()


def told(steps: int, step: Callable[[int], object], words: str) -> None:
    """Exactly one warning in so many steps, and none of another kind."""

    def train_on() -> None:
        for number in range(steps):
            step(number)

    with pytest.warns(UserWarning, match=words) as caught:
        train_on()
    assert len(caught) == 1, [str(one.message) for one in caught]


def make(**options: object) -> tuple[Net, torch.optim.Optimizer, SaliencyRegularizer, Tensor]:
    torch.manual_seed(0)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    regularizer = SaliencyRegularizer(
        model, "heads", optimizer=optimizer, **{"strength": 0.1, "metric": "l1", **options}
    )
    return model, optimizer, regularizer, torch.randn(5, 4, dtype=torch.float64)


def train(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_what_acts_is_not_told() -> None:
    """Heads run in pairs, the strength is 0 at first, and micro-batches are added up, in many steps without a word."""
    model, optimizer, regularizer, x = make(start_step=5, surgery=PCGrad())
    for step in range(25):
        for pair in ("ab", "bc"):
            (loss_of(model(x, pair)) + regularizer()).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("order", ["abc", "aab", "a"])
def test_one_head_in_each_call(order: str) -> None:
    model, optimizer, regularizer, x = make()
    told(
        15,
        lambda step: train(loss_of(model(x, order[step % len(order)])) + regularizer(), optimizer),
        "never two tasks have come together in 5 training calls.*Pass run_all_heads=True",
    )


def test_one_loss_in_each_call() -> None:
    model, optimizer, regularizer, x = make(target="loss")

    def step(number: int) -> None:
        task = "abc"[number % 3]
        losses = {task: model(x)[task].square().mean()}
        train(losses[task] + regularizer(losses=losses), optimizer)

    told(15, step, "never two tasks have come together.*Pass the losses of all tasks")


def test_one_head_with_run_all_heads_is_not_told() -> None:
    model, optimizer, regularizer, x = make(run_all_heads=True)
    for step in range(12):
        train(loss_of(model(x, "abc"[step % 3])) + regularizer(), optimizer)


def test_a_head_that_runs_no_more() -> None:
    model, optimizer, regularizer, x = make()
    told(
        30,
        lambda step: train(loss_of(model(x, "ab" if step > 5 else "abc")) + regularizer(), optimizer),
        r"heads of \['c'\] have not run in 100 training calls",
    )


def test_the_line_is_forgotten() -> None:
    model, optimizer, _regularizer, x = make()
    told(25, lambda _: train(loss_of(model(x)), optimizer), "100 training forwards.*loss = losses \\+ regularizer")


def test_the_line_is_forgotten_where_the_heads_are_not_seen() -> None:
    """The optimizer steps alone: the loop trains a copy of the heads, or runs the model in evaluation mode."""
    model, optimizer, _regularizer, x = make()
    model.eval()
    told(25, lambda _: train(loss_of(model(x)), optimizer), "optimizer took 100 steps and regularizer")


def test_the_line_is_forgotten_after_a_while_and_without_an_optimizer() -> None:
    model, _optimizer, regularizer, x = make()
    loss_of(model(x)).add(regularizer()).backward()
    told(25, lambda _: loss_of(model(x)).backward(), "100 training forwards")


@pytest.mark.parametrize("acts", [lambda step: step % 4 == 3, lambda step: step >= 4], ids=["every fourth", "later"])
@pytest.mark.parametrize("run_all", [False, True])
def test_a_penalty_in_some_steps_alone_is_not_told(acts: Callable[[int], bool], run_all: bool) -> None:
    """The forwards of steps without it are over when the optimizer took its step."""
    model, optimizer, regularizer, x = make(run_all_heads=run_all)
    for step in range(9):
        for _ in range(2):  # micro-batches
            loss = loss_of(model(x))
            (loss + regularizer() if acts(step) else loss).backward()
        optimizer.step()
        assert not acts(step) or regularizer.report.penalty > 0


@pytest.mark.parametrize(("run_all", "tasks"), [(False, "abc"), (False, "ab"), (True, "abc"), (True, "a")])
def test_several_forwards_and_one_call(run_all: bool, tasks: str) -> None:
    model, optimizer, regularizer, x = make(run_all_heads=run_all)

    def step(_: int) -> None:
        loss = sum(loss_of(model(x, tasks)) for _ in range(3))
        train(loss + regularizer(), optimizer)

    told(4, step, "3 forwards ran before this call, whose penalty is that of the latest one alone")


def test_forwards_in_evaluation_between_two_steps_are_not_told() -> None:
    model, optimizer, regularizer, x = make()
    for _ in range(3):
        model.eval()
        for _ in range(2):
            model(x)
        model.train()
        train(loss_of(model(x)) + regularizer(), optimizer)


@pytest.mark.parametrize("how", ["disabled", "evaluation", "no_grad", "removed"])
def test_a_regularizer_that_is_not_to_act_is_not_told(how: str) -> None:
    model, _optimizer, regularizer, x = make()
    if how == "disabled":
        regularizer.enabled = False
    elif how == "removed":
        regularizer.remove()
    elif how == "evaluation":
        model.eval()
    for _ in range(25):
        with torch.set_grad_enabled(how != "no_grad"):
            model(x)


def test_a_call_within_no_grad_is_none() -> None:
    model, optimizer, regularizer, x = make()

    def step(_: int) -> None:
        loss = loss_of(model(x))
        with torch.no_grad():
            loss += regularizer()
        train(loss, optimizer)

    told(15, step, "was not called with gradients enabled")


@pytest.mark.parametrize("use", [lambda p: 0, lambda p: p.item(), lambda p: p.detach()])
def test_a_penalty_that_is_not_differentiated(use: Callable[[Tensor], object]) -> None:
    model, optimizer, regularizer, x = make()
    told(
        25,
        lambda _: train(loss_of(model(x)) + use(regularizer()), optimizer),
        r"no backward pass has reached the penalty in 100 training calls.*without .item\(\)",
    )


def test_a_penalty_that_is_not_differentiated_in_a_loop_without_steps() -> None:
    model, _optimizer, regularizer, x = make()

    def step(_: int) -> None:
        loss_of(model(x)).backward()
        regularizer()

    model.heads.requires_grad_(True)
    with pytest.raises(Exception, match="freed by a backward pass"):
        step(0)

    def in_order(_: int) -> None:
        outputs = model(x)
        regularizer()
        loss_of(outputs).backward()

    told(25, in_order, "relations have not moved.*Also, no backward pass has reached the penalty")


def test_outputs_without_a_graph() -> None:
    model, _optimizer, regularizer, x = make()
    model.requires_grad_(False)

    def step(_: int) -> None:
        model(x)
        assert regularizer() == 0

    told(25, step, "returned 0 in 100 calls.*carry no graph")


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("why", ["create_graph", "frozen", "other losses"])
def test_surgery_that_never_weighs(alone: bool, why: str) -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)
    if why == "frozen":
        model.backbone.requires_grad_(False)
    options = {"weighting": PCGrad()} if alone else {"surgery": PCGrad(), "strength": 0.1}
    attached = (FeatureSurgery if alone else SaliencyRegularizer)(model, "heads", **options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    words = "surgery has weighed no gradient in 100 training forwards.*without create_graph"

    def step(_: int) -> None:
        loss = loss_of(model(x))
        if why == "other losses":
            loss = model.backbone(x).square().mean()
        if not alone:
            loss = loss + attached()
            attached.step()
        torch.autograd.grad(loss, parameters, create_graph=why == "create_graph", allow_unused=True)

    told(25, step, words)


def test_surgery_that_weighs_is_not_told() -> None:
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)
    surgery = FeatureSurgery(model, "heads")
    loss_of(model(x)).backward()
    for _ in range(15):
        model(x)
    assert surgery.report is None


class Adapted(nn.Module):
    """As adapters for fine-tuning: the head's own layer runs, and is not all of it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.more = nn.Linear(6, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.more(x)


@pytest.mark.parametrize("replaced", ["adapted", "in a sequence", "new", "all of them"])
def test_a_head_that_is_replaced(replaced: str) -> None:
    model, optimizer, regularizer, x = make()
    train(loss_of(model(x)) + regularizer(), optimizer)
    if replaced == "adapted":
        model.heads["b"] = Adapted(model.heads["b"])
    elif replaced == "in a sequence":
        model.heads["b"] = nn.Sequential(model.heads["b"], nn.Softplus())
    elif replaced == "new":
        model.heads["b"] = copy.deepcopy(model.heads["b"])
    else:
        model.heads = nn.ModuleDict({**dict(model.heads.items()), "b": nn.Linear(6, 1).double()})
    name = "heads" if replaced == "all of them" else "heads.b"
    told(
        15,
        lambda _: train(loss_of(model(x)) + regularizer(), optimizer),
        f"'{name}' is no longer the module.*build the regularizer anew",
    )


def test_wrappers_around_a_head_are_no_replacement() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, optimizer, regularizer, x = make()
    model.heads["b"] = checkpoint_wrapper(model.heads["b"])
    train(loss_of(model(x)) + regularizer(), optimizer)


class Around(nn.Module):
    """Runs a model, or holds the heads of one, and is nothing else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getitem__(self, task: str) -> nn.Module:
        return self.module[task]

    def forward(self, *args: object) -> object:
        return self.module(*args)


@pytest.mark.parametrize("around", ["the heads", "the model"])
def test_containers_around_heads_are_no_replacement(around: str) -> None:
    torch.manual_seed(0)
    outer = nn.ModuleDict({"net": Net().double()})
    model, x = outer["net"], torch.randn(5, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    regularizer = SaliencyRegularizer(outer, "net.heads", optimizer=optimizer, strength=0.1, metric="l1")
    if around == "the heads":
        model.heads = Around(model.heads)
    else:
        outer["net"] = Around(model)
    for _ in range(3):
        train(loss_of(outer["net"](x)) + regularizer(), optimizer)
        assert regularizer.report.penalty > 0


@pytest.mark.parametrize("schedule", [{}, {"start_step": 10}, {"warmup_steps": 100}])
def test_a_strength_that_drowns_the_losses(schedule: dict, caplog: pytest.LogCaptureFixture) -> None:
    """The strength that is named gives the share that is said, whatever the schedule."""
    model, optimizer, regularizer, x = make(strength=5000.0, relations="fixed", **schedule)
    with caplog.at_level(logging.WARNING, "saliency_reg"):
        for _ in range(2):
            outputs = model(x)
            losses = {task: output.square().mean() for task, output in outputs.items()}
            train(sum(losses.values()) + 0 * regularizer(losses=losses), optimizer)
    (record,) = [record for record in caplog.records if "times the task losses" in record.getMessage()]
    share, strength, effect, advice = record.args
    assert (strength, effect) == (5000, "drowns them")
    low, high = re.search(r"strength=(\S+) to (\S+)\.$", advice).groups()
    assert [float(low), float(high)] == pytest.approx([aim * 5000 / share for aim in USEFUL_SHARES], rel=0.05)
    regularizer.remove()
    model, optimizer, regularizer, x = make(strength=5000 / share, relations="fixed")
    outputs = model(x)
    regularizer(losses=loss_of(outputs))
    assert regularizer.report.share == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 100}])
def test_a_strength_that_is_hardly_felt(schedule: dict, caplog: pytest.LogCaptureFixture) -> None:
    """Told once it is sure, not by the first calls: heads may begin near zero."""
    model, optimizer, regularizer, x = make(strength=1e-5, relations="fixed", **schedule)

    def told() -> list[logging.LogRecord]:
        return [record for record in caplog.records if "times the task losses" in record.getMessage()]

    with caplog.at_level(logging.WARNING, "saliency_reg"):
        for call in range(20):
            assert bool(told()) == (call >= 10)
            outputs = model(x)
            losses = {task: output.square().mean() for task, output in outputs.items()}
            train(sum(losses.values()) + regularizer(losses=losses), optimizer)
    (record,) = told()
    share, strength, effect, advice = record.args
    assert (strength, effect) == (1e-5, "will hardly be felt")
    assert share < 0.0005
    assert float(re.search(r"strength=(\S+) to", advice)[1]) == pytest.approx(USEFUL_SHARES[0] * 1e-5 / share, rel=0.05)


def test_a_strength_that_drowns_nothing_and_one_that_is_set_later(caplog: pytest.LogCaptureFixture) -> None:
    model, _optimizer, regularizer, x = make(strength=1e-3)

    def call(**arguments: object) -> list[str]:
        outputs = model(x)
        regularizer(**{"losses": loss_of(outputs), **arguments})
        return [record.getMessage() for record in caplog.records if "times the task losses" in record.getMessage()]

    with caplog.at_level(logging.WARNING, "saliency_reg"):
        assert not call(losses=None)  # nothing can be said
        assert not call()
        regularizer.strength = 1e6
        assert len(call()) == 1
        assert len(call()) == 1


def test_counts_survive_copies_and_pickles() -> None:
    model, optimizer, regularizer, x = make()
    for _ in range(3):
        train(loss_of(model(x)) + regularizer(), optimizer)
    for copied in (copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        feature = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        outputs = {task: head(feature) for task, head in copy.deepcopy(model).heads.items()}
        copied(outputs=outputs, features=feature)
        copied.step()
        assert int(copied.steps) == 4
