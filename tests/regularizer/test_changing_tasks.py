"""Tasks that come and go while a regularizer is in use: relations, penalties, hooks and states; refusals change nothing."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from saliency_reg import PCGrad, RelationWeights, SaliencyRegularizer
from saliency_reg.errors import (
    CaptureError,
    ConfigurationError,
    HeadNotFoundError,
    SaliencyRegError,
    StateMismatchError,
    SurgeryError,
    TaskError,
    WrongTypeError,
)
from tests.support.attachment import fingerprint
from tests.support.two_processes import run_on_two_processes

RULES = ("entropic", "per_task", "projected", "authors", "fixed")


def new_head() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 1)).double()


class Net(nn.Module):
    def __init__(self, tasks: str = "abc") -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double()
        self.heads = nn.ModuleDict({task: new_head() for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.backbone(x)
        return {task: head(feature) for task, head in self.heads.items()}


class Columns(nn.Module):
    """One ``Linear`` for all tasks."""

    def __init__(self, columns: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double()
        self.fc = nn.Linear(8, columns).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))

    def widen(self, columns: int) -> None:
        before = self.fc
        self.fc = nn.Linear(8, columns).double()
        with torch.no_grad():
            self.fc.weight[: len(before.weight)] = before.weight[:columns]
            self.fc.bias[: len(before.bias)] = before.bias[:columns]


def inputs(seed: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attached(net: nn.Module, **options: Any) -> SaliencyRegularizer:
    given = {"heads": "heads" if isinstance(net, Net) else "fc", "strength": 0.5, "metric": "l1", **options}
    return SaliencyRegularizer(net, **given)


def outputs_of(net: nn.Module, seed: int) -> list[Tensor]:
    found = net(inputs(seed))
    return list(found.values()) if isinstance(found, dict) else [found]


def train(net: nn.Module, regularizer: SaliencyRegularizer, optimizer: Any, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        loss = sum((output - seed % 3).square().mean() for output in outputs_of(net, seed))
        (loss + regularizer()).backward()
        optimizer.step()


def trained(rule: str = "entropic", *, steps: int = 4, **options: Any) -> tuple[Net, SaliencyRegularizer, Any]:
    torch.manual_seed(1)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    relations = RelationWeights(3, rule, learning_rate=0.01)
    regularizer = attached(net, relations=relations, optimizer=optimizer, **options)
    train(net, regularizer, optimizer, range(steps))
    return net, regularizer, optimizer


def state(regularizer: SaliencyRegularizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in regularizer.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    different = [name for name, value in found.items() if not torch.equal(value, expected[name])]
    assert different == []


def one_pass(net: nn.Module, regularizer: SaliencyRegularizer, seed: int = 50) -> tuple[Tensor, list[Tensor]]:
    """The penalty, and the gradients of losses and penalty."""
    net.zero_grad()
    outputs = outputs_of(net, seed)
    penalty = regularizer()
    (sum(output.square().mean() for output in outputs) + penalty).backward()
    return penalty.detach(), [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


def assert_as_if_built_now(net: nn.Module, regularizer: SaliencyRegularizer, **options: Any) -> None:
    """Penalty and gradients are those of one that is built on a copy, with these weights."""
    twin = copy.deepcopy(net)
    matrix = RelationWeights(len(regularizer.tasks), "fixed", matrix=regularizer.relations.matrix())
    if regularizer.surgery is not None:
        options["surgery"] = PCGrad()
        options["surgery"].load_state_dict(regularizer.surgery.weighting.state_dict())
    fresh = attached(twin, relations=matrix, **options)
    assert fresh.tasks == regularizer.tasks
    assert [part is not None for part in regularizer.heads] == [True] * len(fresh.heads)
    found, gradients = one_pass(net, regularizer)
    expected, expected_gradients = one_pass(twin, fresh)
    assert float(expected) > 0
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)


class TestSeparateHeads:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("surgery", [False, True])
    def test_a_task_that_comes_and_goes_leaves_no_trace(self, rule: str, surgery: bool) -> None:
        net, regularizer, optimizer = trained(rule, surgery=PCGrad() if surgery else None)
        net(inputs(30))
        regularizer()  # pending
        before, on_model = state(regularizer), fingerprint(net)
        twin, unchanged, its_optimizer = trained(rule, surgery=PCGrad() if surgery else None)
        twin(inputs(30))
        unchanged()
        net.heads["x"] = new_head()
        regularizer.add_task("x")
        assert regularizer.tasks == ("a", "b", "c", "x")
        assert regularizer.heads == tuple(net.heads[task] for task in "abcx") or not surgery
        regularizer.remove_task("x")
        del net.heads["x"]
        assert_same(state(regularizer), before)
        assert {name: len(hooks) for name, hooks in _hooks(net).items()} == {
            name: len(hooks) for name, hooks in on_model.items() if isinstance(hooks, list)
        }
        # And it trains on as if nothing had been.
        train(net, regularizer, optimizer, range(60, 63))
        train(twin, unchanged, its_optimizer, range(60, 63))
        assert_same(state(regularizer), state(unchanged))
        assert all(torch.equal(one, other) for one, other in zip(net.parameters(), twin.parameters()))

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("surgery", [False, True])
    def test_penalty_and_gradients_are_those_of_one_that_is_built_now(self, rule: str, surgery: bool) -> None:
        net, regularizer, optimizer = trained(rule, surgery=PCGrad() if surgery else None)
        matrix, steps = regularizer.relations.matrix(), regularizer.steps.clone()
        net.heads["x"] = new_head()
        regularizer.add_task("x")
        found = regularizer.relations.matrix()
        assert float(found.triu(1).sum()) == pytest.approx(1)
        if rule != "per_task":
            torch.testing.assert_close(found[:3, :3] / found[0, 1], matrix / matrix[0, 1], rtol=1e-12, atol=0)
        assert torch.equal(regularizer.steps, steps)
        assert regularizer.report is None
        assert_as_if_built_now(net, regularizer)
        assert regularizer.report.tasks == ("a", "b", "c", "x")
        optimizer.add_param_group({"params": net.heads["x"].parameters()})
        before = [parameter.clone() for parameter in net.heads["x"].parameters()]
        train(net, regularizer, optimizer, range(70, 73))
        assert all(not torch.equal(one, other) for one, other in zip(net.heads["x"].parameters(), before))
        regularizer.remove_task("b")
        removed = net.heads.pop("b")
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in removed.modules())
        assert regularizer.tasks == ("a", "c", "x")
        assert_as_if_built_now(net, regularizer)
        train(net, regularizer, optimizer, range(80, 83))

    @pytest.mark.parametrize("rule", RULES)
    def test_a_run_is_resumed_behind_a_change(self, rule: str) -> None:
        net, regularizer, optimizer = trained(rule)
        net.heads["x"] = new_head()
        regularizer.add_task("x")
        regularizer.remove_task("a")
        del net.heads["a"]
        twin = copy.deepcopy(net)
        its_optimizer = torch.optim.SGD(twin.parameters(), 0.1)
        resumed = attached(twin, relations=RelationWeights(3, rule, learning_rate=0.01), optimizer=its_optimizer)
        resumed.load_state_dict(state(regularizer))
        optimizer.add_param_group({"params": net.heads["x"].parameters()})
        train(net, regularizer, optimizer, range(5))
        train(twin, resumed, its_optimizer, range(5))
        assert_same(state(resumed), state(regularizer))
        assert all(torch.equal(one, other) for one, other in zip(net.parameters(), twin.parameters()))

    def test_in_another_order_they_are_the_same(self) -> None:
        found = {}
        for order in ("xy", "yx"):
            net, regularizer, _ = trained("projected")
            heads = {}
            for task in "xy":
                torch.manual_seed(ord(task))
                heads[task] = new_head()
            for task in order:
                net.heads[task] = heads[task]
                regularizer.add_task(task)
            index = [regularizer.tasks.index(task) for task in "abcxy"]
            found[order] = one_pass(net, regularizer)[0], regularizer.relations.matrix()[index][:, index]
        torch.testing.assert_close(found["xy"], found["yx"], rtol=1e-12, atol=1e-12)

    def test_the_strength_goes_on(self) -> None:
        net = Net()
        regularizer = attached(net, strength="auto")
        for seed in range(12):
            losses = {task: output.square().mean() for task, output in net(inputs(seed)).items()}
            regularizer(losses=losses)
            regularizer.step()
        strength = regularizer.strength
        net.heads["x"] = new_head()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            regularizer.add_task("x")
        assert regularizer.strength == strength > 0
        assert regularizer.automatic_strength.steps_measured == 2

    def test_who_makes_the_penalty_reach_the_backbone_is_told(self) -> None:
        net = nn.ModuleDict({"heads": nn.ModuleDict({task: nn.Linear(8, 1) for task in "ab"})})
        regularizer = SaliencyRegularizer(net, heads="heads")
        net["heads"]["x"] = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
        with pytest.warns(UserWarning, match="may reach the backbone"):
            regularizer.add_task("x")
        assert regularizer.share == 0.2

    def test_what_is_not_read_is_dropped(self) -> None:
        net, regularizer, _ = trained()
        net(inputs(0))
        net.heads["x"] = new_head()
        regularizer.add_task("x")
        with pytest.raises(CaptureError, match="has not run a forward yet"):
            regularizer()

    def test_disabled_it_stays_disabled(self) -> None:
        net, regularizer, _ = trained()
        regularizer.enabled = False
        net.heads["x"] = new_head()
        regularizer.add_task("x")
        net(inputs(0))
        assert regularizer() == 0
        regularizer.enabled = True
        net(inputs(0))
        assert regularizer() > 0

    def test_nobody_misses_a_task_that_came_late(self) -> None:
        net, regularizer, optimizer = trained(steps=99)
        net.heads["x"] = new_head()
        regularizer.add_task("x")
        regularizer.remove_task("a")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(net, regularizer, optimizer, range(3))

    def test_pending_distances_of_the_others_count(self) -> None:
        """As if the new head had not run in the first of two micro-batches."""
        net, regularizer, _ = trained(steps=0)
        net(inputs(0))
        regularizer()
        first = regularizer.report.distances
        net.heads["x"] = new_head()
        regularizer.add_task("x")
        net(inputs(1))
        regularizer()
        second = regularizer.report.distances.clone()
        regularizer.step()
        mean = second.clone()
        mean[:3, :3] = (first + second[:3, :3]) / 2
        expected = RelationWeights(4, "entropic")
        expected.update(mean)
        torch.testing.assert_close(regularizer.relations.matrix(), expected.matrix(), rtol=1e-12, atol=1e-12)


def _hooks(net: nn.Module) -> dict[str, Any]:
    return {name: hooks for name, hooks in fingerprint(net).items() if isinstance(hooks, list)}


class TestWhereTheHeadIs:
    def test_places(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.towers = nn.ModuleDict({t: nn.ModuleDict({"fc": nn.Linear(8, 1)}) for t in "ab"})
                self.listed = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])
                self.head_a, self.head_b = nn.Linear(8, 1), nn.Linear(8, 1)

        net = Odd()
        chosen = {
            "towers.*.fc": ("c", lambda head: net.towers.update({"c": nn.ModuleDict({"fc": head})})),
            "listed": ("2", net.listed.append),
            "head_*": ("head_c", lambda head: setattr(net, "head_c", head)),
        }
        for heads, (task, put) in chosen.items():
            regularizer = SaliencyRegularizer(net, heads, strength=0.1)
            put(head := nn.Linear(8, 1))
            regularizer.add_task(task)
            assert regularizer.heads[-1] is head, heads
            regularizer.remove()

    def test_what_nobody_has_yet(self) -> None:
        net = nn.ModuleDict({"listed": nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])})
        regularizer = SaliencyRegularizer(net, "listed", tasks=["joy", "grief"], strength=0.1)
        net["listed"].append(nn.Linear(8, 1))
        regularizer.add_task("pride")
        assert regularizer.heads[-1] is net["listed"][2]
        net["listed"].extend([nn.Linear(8, 1), nn.Linear(8, 1)])
        with pytest.raises(HeadNotFoundError, match="several modules may be it: 'listed.3', 'listed.4'"):
            regularizer.add_task("fear")
        regularizer.add_task("fear", net["listed"][4])
        regularizer.add_task("awe", "listed.3")
        assert regularizer.heads[3:] == (net["listed"][4], net["listed"][3])

    def test_heads_of_several_modules(self) -> None:
        class Towers(Net):
            def __init__(self) -> None:
                super().__init__("ab")
                self.towers, self.last = nn.ModuleDict(), nn.ModuleDict()
                for task in "ab":
                    self.put(task)
                del self.heads

            def put(self, task: str) -> None:
                self.towers[task] = nn.Sequential(nn.Linear(8, 4), nn.GELU()).double()
                self.last[task] = nn.Linear(4, 1).double()

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                feature = self.backbone(x)
                return {task: self.last[task](tower(feature)) for task, tower in self.towers.items()}

        net = Towers()
        regularizer = attached(net, heads={task: [f"towers.{task}", f"last.{task}"] for task in "ab"})
        net.put("x")
        regularizer.add_task("x", ["towers.x", "last.x"])
        assert_as_if_built_now(net, regularizer, heads={task: [f"towers.{task}", f"last.{task}"] for task in "abx"})
        regularizer.remove_task("a")
        del net.towers["a"], net.last["a"]
        assert_as_if_built_now(net, regularizer, heads={task: [f"towers.{task}", f"last.{task}"] for task in "bx"})

    def test_heads_that_are_not_in_the_model(self) -> None:
        torch.manual_seed(1)
        backbone, heads = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double(), {task: new_head() for task in "abx"}
        regularizer = SaliencyRegularizer(backbone, {task: heads[task] for task in "ab"}, strength=0.5, metric="l1")
        with pytest.raises(HeadNotFoundError, match="the head of the new task 'x' was not found"):
            regularizer.add_task("x")
        regularizer.add_task("x", heads["x"])
        assert regularizer.heads == tuple(heads.values())
        feature = backbone(inputs(0))
        for head in heads.values():
            head(feature)
        assert regularizer() > 0

    def test_choices_of_each_task(self) -> None:
        class Two(Net):
            def forward(self, x: Tensor) -> dict[str, Any]:
                feature = self.backbone(x)
                return {task: head(feature) for task, head in self.heads.items()}

        net = Two("ab")
        regularizer = attached(net, scalarize=["max", "sum"], output={"a": None}, feature="backbone")
        net.heads["x"] = nn.Linear(8, 3).double()
        regularizer.add_task("x", scalarize="logsumexp")
        options = {"output": {"a": None}, "feature": "backbone"}
        assert_as_if_built_now(net, regularizer, scalarize={"a": "max", "b": "sum", "x": "logsumexp"}, **options)
        regularizer.remove_task("a")
        del net.heads["a"]
        assert_as_if_built_now(net, regularizer, scalarize={"b": "sum", "x": "logsumexp"}, feature="backbone")
        assert regularizer.feature_names == ("backbone:output",)

    def test_without_a_model(self) -> None:
        regularizer = SaliencyRegularizer(None, tasks=["a", "b"], strength=1.0, metric="l1")
        regularizer.add_task("c")
        feature = inputs(0).requires_grad_()
        outputs = {task: (feature * (index + 1)).tanh().sum(1) for index, task in enumerate("abc")}
        found = regularizer(outputs=outputs, features=feature)
        fresh = SaliencyRegularizer(None, tasks=["a", "b", "c"], strength=1.0, metric="l1")
        assert found == fresh(outputs=outputs, features=feature) > 0
        with pytest.raises(ConfigurationError, match="model= is for a regularizer that was built with one"):
            regularizer.add_task("d", model=Net())


class TestColumns:
    @pytest.mark.parametrize("surgery", [False, True])
    def test_one_column_each(self, surgery: bool) -> None:
        net = Columns()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        regularizer = attached(net, tasks=list("abc"), surgery=PCGrad() if surgery else None, optimizer=optimizer)
        train(net, regularizer, optimizer, range(3))
        matrix = regularizer.relations.matrix()
        old = net.fc
        net.widen(4)
        regularizer.add_task("x")
        assert regularizer.heads == (net.fc,)
        assert not old._forward_hooks
        found = regularizer.relations.matrix()
        torch.testing.assert_close(found[:3, :3] / found[0, 1], matrix / matrix[0, 1])
        assert_as_if_built_now(net, regularizer, tasks=list("abcx"))
        net.fc = nn.Linear(8, 3).double()
        regularizer.remove_task("b")
        assert_as_if_built_now(net, regularizer, tasks=list("acx"))

    def test_several_columns_each(self) -> None:
        net = Columns(5)
        regularizer = attached(net, columns={"a": slice(0, 2), "b": [2, 3], "c": 4})
        net.widen(7)
        with pytest.raises(TaskError, match="not known which columns of head 'fc' are those of 'x'"):
            regularizer.add_task("x")
        regularizer.add_task("x", columns=slice(5, 7))
        columns = {"a": slice(0, 2), "b": [2, 3], "c": 4, "x": slice(5, 7)}
        assert_as_if_built_now(net, regularizer, columns=columns)
        regularizer.remove_task("b")  # its columns are nobody's
        del columns["b"]
        assert_as_if_built_now(net, regularizer, columns=columns)
        net.fc = nn.Linear(8, 3).double()
        with pytest.raises(TaskError, match="is another module now"):
            regularizer.remove_task("c")
        regularizer.remove_task("c", columns={"x": 2, "a": slice(0, 2)})
        assert regularizer.tasks == ("a", "x")
        assert_as_if_built_now(net, regularizer, columns={"a": slice(0, 2), "x": 2})

    def test_what_cannot_be_told_is_refused(self) -> None:
        net = Columns()
        regularizer = attached(net, tasks=list("abc"))
        before = state(regularizer)
        with pytest.raises(TaskError, match="head 'fc' has 3 columns, and the tasks are now"):
            regularizer.add_task("x")
        with pytest.raises(TaskError, match="head 'fc' has 3 columns, and the tasks are now"):
            regularizer.remove_task("a")
        net.widen(6)
        with pytest.raises(TaskError, match="has 6 columns, and the tasks are now"):
            regularizer.add_task("x")
        with pytest.raises(TaskError, match="has had a column for each task"):
            regularizer.add_task("x", columns=slice(3, 6))
        with pytest.raises(TaskError, match="columns= names"):
            regularizer.add_task("x", columns={"x": 0})
        with pytest.raises(TaskError, match="has 6 columns"):
            regularizer.add_task("x", columns={"a": 0, "b": 1, "c": 2, "x": slice(3, 9)})
        assert_same(state(regularizer), before)
        regularizer.add_task("x", columns={"a": 0, "b": 1, "c": 2, "x": slice(3, 6)})
        assert_as_if_built_now(net, regularizer, columns={"a": 0, "b": 1, "c": 2, "x": slice(3, 6)})


class TestSurgery:
    def test_a_weighting_with_state_is_begun_anew(self) -> None:
        class Smooth(nn.Module):
            mean: Tensor | None = None

            def forward(self, gramian: Tensor) -> Tensor:
                norms = gramian.diagonal()
                self.mean = norms if self.mean is None else 0.5 * self.mean + 0.5 * norms
                return self.mean / self.mean.sum()

            def reset(self) -> None:
                self.mean = None

        net, regularizer, optimizer = trained(surgery=Smooth())
        net.heads["x"] = new_head()
        with pytest.warns(UserWarning, match="Smooth keeps state of the tasks, and is begun anew"):
            regularizer.add_task("x")
        assert regularizer.surgery.weighting.mean is None
        train(net, regularizer, optimizer, range(2))
        assert regularizer.report.surgery.tasks == ("a", "b", "c", "x")

    def test_a_weighting_for_a_number_of_tasks_is_refused(self) -> None:
        fixed = torch.tensor([1.0, 2.0, 3.0])
        net, regularizer, optimizer = trained(surgery=lambda gramian: fixed)
        before = state(regularizer)
        net.heads["x"] = new_head()
        with pytest.raises(ConfigurationError, match="cannot weigh 4 tasks"):
            regularizer.add_task("x")
        del net.heads["x"]
        assert_same(state(regularizer), before)
        train(net, regularizer, optimizer, range(2))

    def test_a_backward_pass_of_before_is_refused(self) -> None:
        net, regularizer, _ = trained(surgery=PCGrad())
        loss = sum(output.square().mean() for output in net(inputs(0)).values())
        net.heads["x"] = new_head()
        regularizer.add_task("x")
        with pytest.raises(SurgeryError, match="of a forward with 3 tasks, and there are 4 now"):
            loss.backward()


class TestRefusals:
    @pytest.mark.parametrize(
        ("action", "kind", "words"),
        [
            (lambda r, _: r.add_task("a"), TaskError, "there is a task 'a' already"),
            (lambda r, _: r.add_task(3), WrongTypeError, "a task name must be a str, found int"),
            (lambda r, _: r.add_task("x"), HeadNotFoundError, "looked for 'heads.x'): there is none"),
            (lambda r, _: r.add_task("x", "heads.y"), HeadNotFoundError, "has no head 'heads.y'"),
            (lambda r, _: r.add_task("x", "heads.a"), TaskError, "head 'heads.a' was given twice"),
            (lambda r, _: r.add_task("x", "backbone", columns=1), TaskError, "Leave columns= out"),
            (lambda r, _: r.add_task("x", "backbone", scalarize="most"), ConfigurationError, "unknown scalarize"),
            (lambda r, _: r.add_task("x", "backbone", output="logits"), ConfigurationError, "output= is None for all"),
            (lambda r, _: r.add_task("x", "backbone", model=3), WrongTypeError, "model must be a torch.nn.Module"),
            (lambda r, _: r.remove_task("x"), TaskError, "there is no task 'x' to remove"),
            (lambda r, _: r.remove_task("a", columns={}), TaskError, "are for one head with the outputs of all"),
            (lambda r, net: r.add_task("x", "heads.x", model=net), HeadNotFoundError, "has no head 'heads.x'"),
        ],
    )
    def test_everything_is_as_it_was(self, action: Any, kind: type[Exception], words: str) -> None:
        net, regularizer, optimizer = trained(surgery=PCGrad())
        before, on_model, described = state(regularizer), fingerprint(net), regularizer.describe()
        with pytest.raises(kind, match=words.replace("(", r"\(").replace(")", r"\)")) as caught:
            action(regularizer, net)
        assert isinstance(caught.value, SaliencyRegError)
        assert_same(state(regularizer), before)
        assert fingerprint(net) == on_model
        assert regularizer.describe() == described
        train(net, regularizer, optimizer, range(2))

    def test_two_tasks_are_the_least(self) -> None:
        net = Net("ab")
        regularizer = attached(net)
        with pytest.raises(TaskError, match=r"one task would be left of \['a', 'b'\]"):
            regularizer.remove_task("a")

    def test_another_head_was_replaced(self) -> None:
        net, regularizer, _ = trained()
        net.heads["a"], net.heads["x"] = new_head(), new_head()
        with pytest.raises(HeadNotFoundError, match="the head 'heads.a' of task 'a' is not in the model any more"):
            regularizer.add_task("x")
        regularizer.remove_task("a")
        regularizer.add_task("a", "heads.a")
        assert regularizer.heads == (net.heads["b"], net.heads["c"], net.heads["a"])

    def test_copies_and_removed_ones(self) -> None:
        net, regularizer, _ = trained()
        net.heads["x"] = new_head()
        for one in (copy.deepcopy(regularizer), regularizer):
            regularizer.remove()
            with pytest.raises(CaptureError, match="attached to no model: it is a copy, it was removed"):
                one.add_task("x")
            with pytest.raises(CaptureError, match="attached to no model"):
                one.remove_task("a")


class TestStatesOfOtherTasks:
    @pytest.mark.parametrize("rule", RULES)
    def test_by_their_names(self, rule: str) -> None:
        """A state of a, b, c for c, x, a is that of a regularizer in which b went, x came, and the order changed."""
        net, regularizer, _ = trained(rule)
        net(inputs(9))
        regularizer()
        saved = state(regularizer)
        other = attached(Net("cxa"), relations=RelationWeights(3, rule, learning_rate=0.01))
        with pytest.raises(StateMismatchError, match="tasks='common'"):
            other.load_state_dict(saved)
        other.load_state_dict(saved, tasks="common")
        assert other.steps == regularizer.steps == 4
        assert other.tasks == ("c", "x", "a")
        changed = copy.deepcopy(regularizer)
        changed.relations.change_tasks([2, None, 0])
        torch.testing.assert_close(other.relations.matrix(), changed.relations.matrix(), rtol=1e-12, atol=1e-12)
        assert other.saliency_seen.tolist() == [1, 0, 1]
        pending = regularizer.pending.distances
        assert float(pending[0, 2]) == float(other.pending.distances[0, 2]) > 0
        assert not other.pending.distances[1].any()
        # A state of the same tasks is loaded as ever.
        again = attached(Net("cxa"), relations=RelationWeights(3, rule, learning_rate=0.01))
        again.load_state_dict(state(other), tasks="common")
        assert_same(state(again), state(other))

    def test_refusals_load_nothing(self) -> None:
        _, regularizer, _ = trained()
        saved = state(regularizer)
        other = attached(Net("xyz"))
        before = state(other)
        with pytest.raises(StateMismatchError, match="of which this regularizer has none"):
            other.load_state_dict(saved, tasks="common")
        with pytest.raises(ConfigurationError, match="tasks"):
            other.load_state_dict(saved, tasks="some")
        assert_same(state(other), before)
        other = attached(Net("abx"), relations="projected")
        with pytest.raises(StateMismatchError, match="another rule"):
            other.load_state_dict(saved, tasks="common")
        other = attached(Net("abx"))
        before = state(other)
        with pytest.raises(StateMismatchError, match="has no task_names"):
            other.load_state_dict({}, tasks="common")
        with pytest.raises(StateMismatchError, match="expected"):
            other.load_state_dict({**saved, "saliency_seen": torch.zeros(5)}, tasks="common")
        assert_same(state(other), before)


# Two processes.


def _two_processes(rank: int) -> dict[str, Any]:
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    torch.manual_seed(4)
    net = Net()
    ddp = DistributedDataParallel(net)
    regularizer = attached(ddp, heads="module.heads")
    found: dict[str, Any] = {}

    def call(model: nn.Module) -> None:
        net.zero_grad()
        loss = sum(output.square().mean() for output in model(inputs(rank)).values())
        (loss + regularizer()).backward()
        regularizer.step()

    def error(action: Any) -> str:
        try:
            action()
        except SaliencyRegError as caught:
            return f"{type(caught).__name__}: {caught}"
        return ""

    call(ddp)
    torch.manual_seed(5)
    net.heads["x"] = new_head()
    found["same wrapper"] = error(lambda: regularizer.add_task("x"))
    again = DistributedDataParallel(net)
    # One adds, the other adds another one, fails alone, or trains on.
    net.heads["y"] = new_head()
    found["other task"] = error(lambda: regularizer.add_task("xy"[rank], model=again))
    found["fails alone"] = error(lambda: regularizer.add_task("x" if rank else "z", model=again))
    before = state(regularizer)
    if rank:
        net(inputs(rank))  # the wrapper would wait for the other's forward
    found["trains on"] = error(regularizer if rank else lambda: regularizer.add_task("x", model=again))
    assert_same(state(regularizer), before)
    del net.heads["y"]
    # All do the same.
    regularizer.add_task("x", model=again)
    for _ in range(2):
        call(again)
    found["gradient"] = next(net.heads["x"].parameters()).grad.clone()
    del net.heads["a"]
    last = DistributedDataParallel(net)
    regularizer.remove_task("a", model=last)
    call(last)
    found["matrix"], found["tasks"] = regularizer.relations.matrix(), regularizer.tasks
    return found


def test_two_processes_change_their_tasks_together() -> None:
    ours, theirs = run_on_two_processes(_two_processes, timeout=180.0)
    for found in (ours, theirs):
        assert "pass model= the new wrapper" in found["same wrapper"]
        assert (
            "different change of tasks: \"add_task('x')\" on rank 0, \"add_task('y')\" on rank 1" in found["other task"]
        )
        assert "different change of tasks" in found["fails alone"]
        assert "which fails" in found["fails alone"]
        assert "different change of tasks: \"add_task('x')\" on rank 0, None on rank 1" in found["trains on"]
        assert found["tasks"] == ("b", "c", "x")
    assert torch.equal(ours["matrix"], theirs["matrix"])
    assert torch.equal(ours["gradient"], theirs["gradient"])
    assert ours["gradient"].any()
