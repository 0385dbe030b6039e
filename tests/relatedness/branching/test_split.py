"""Splits: the function and its gradient stay, optimizers and state dicts follow."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import (
    BranchingModel,
    ConfigurationError,
    ModuleNotFoundInModelError,
    SaliencyRegularizer,
    StateMismatchError,
    TaskError,
    WrongTypeError,
)

from .models import BACKBONES, TASKS, branching

PAIRS = [["first", "third"], ["second", "fourth"]]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.01),
}


def loss_of(outputs: dict[str, Tensor], tasks: tuple[str, ...] = TASKS) -> Tensor:
    return torch.stack([(TASKS.index(task) + 1) * (outputs[task] - 1).square().mean() for task in tasks]).sum()


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, number: int = 2, **options: Any) -> None:
    for step in range(number):
        optimizer.zero_grad()
        loss_of(model(x + step), **options).backward()
        optimizer.step()


def split_to_the_bottom(model: BranchingModel, optimizer: Any = None) -> None:
    model.split(-1 + len(model.stages), [["first"], ["second"], ["third", "fourth"]], optimizer=optimizer)
    for stage in reversed(model.stage_names[:-1]):
        model.split(stage, [["first", "second"], ["third", "fourth"]], optimizer=optimizer)


def states(optimizer: torch.optim.Optimizer) -> list[tuple[int, str, Any]]:
    saved = optimizer.state_dict()["state"]
    return [(number, name, value) for number, state in sorted(saved.items()) for name, value in sorted(state.items())]


def assert_equal_states(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    assert one.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    for (number, name, value), (other_number, other_name, expected) in zip(states(one), states(other), strict=True):
        assert (number, name) == (other_number, other_name)
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected)), (number, name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_outputs_are_the_same_bit_for_bit(name: str, training: bool) -> None:
    model, x = branching(name)
    x = torch.cat([x, x + 1])
    model.train(training)
    twin = copy.deepcopy(model)
    expected = twin(x)
    split_to_the_bottom(model)
    outputs = model(x)
    assert [*outputs] == [*TASKS]
    for task in TASKS:
        assert torch.equal(outputs[task], expected[task])
    for columns, column in zip(model.stages, twin.stages):  # BatchNorm has seen the same in each copy
        for copied in columns:
            for one, other in zip(copied.buffers(), column[0].buffers(), strict=True):
                assert torch.equal(one, other)


def test_each_copy_has_the_gradient_of_its_tasks(float64: None) -> None:
    model, x = branching()
    twin = copy.deepcopy(model)
    split_to_the_bottom(model)
    loss_of(model(x)).backward()
    loss_of(twin(x)).backward()
    for columns, shared in zip(model.stages, twin.stages):
        for whole, *parts in zip(shared[0].parameters(), *(column.parameters() for column in columns), strict=True):
            assert len(parts) >= 2
            torch.testing.assert_close(sum(part.grad for part in parts), whole.grad, rtol=1e-10, atol=1e-12)
    for tasks, column in zip(model.partitions[0], model.stages[0]):
        alone = torch.autograd.grad(loss_of(twin(x), tasks), list(twin.stages[0][0].parameters()))
        for parameter, expected in zip(column.parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_copy_trains_on_as_the_network_would_with_its_tasks_alone(name: str, float64: None) -> None:
    model, x = branching()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, x)
    alone = []
    for group in PAIRS:
        twin = copy.deepcopy(model)
        own = OPTIMIZERS[name](twin.parameters())
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(twin, own, x, 1, tasks=tuple(group))
        alone.append(twin)
    model.split("5", PAIRS, optimizer=optimizer)
    steps(model, optimizer, x, 1)
    for column, twin in zip(model.stages[2], alone):
        for trained, expected in zip(column.parameters(), twin.stages[2][0].parameters(), strict=True):
            torch.testing.assert_close(trained, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = (parts[2][0].get_parameter("5.weight") for parts in (model.stages, alone[1].stages))
    assert not torch.allclose(ours, theirs)  # the two groups do pull apart


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dicts_have_the_tree_and_the_training_goes_on(name: str) -> None:
    model, x = branching()
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, x)
    model.split("5", [["first"], ["second"], ["third", "fourth"]], optimizer=optimizer)
    steps(model, optimizer, x, 1)
    model.split("2", [["second"], ["first", "third", "fourth"]], optimizer=optimizer)
    steps(model, optimizer, x, 1)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    fresh, _ = branching(seed=5)
    fresh.load_state_dict(saved["model"])
    own = OPTIMIZERS[name](fresh.parameters())
    own.load_state_dict(saved["optimizer"])
    assert fresh.partitions == model.partitions
    assert fresh.describe() == model.describe()
    assert_equal_states(own, optimizer)
    for partition in ([["second"], ["first"], ["third", "fourth"]], [["second"], ["first"], ["third", "fourth"]]):
        for each, with_its in ((model, optimizer), (fresh, own)):
            steps(each, with_its, x, 1)
            each.split("2", partition, optimizer=with_its)
        for (key, value), (other, expected) in zip(fresh.state_dict().items(), model.state_dict().items(), strict=True):
            assert key == other
            assert torch.equal(value, expected)


def test_a_state_dict_within_that_of_another_module_and_of_less_columns() -> None:
    model, x = branching()
    split_to_the_bottom(model)
    outer = nn.ModuleDict({"inner": branching(seed=5)[0]})
    outer.load_state_dict({f"inner.{name}": value for name, value in model.state_dict().items()})
    model.eval()
    outer.eval()
    assert torch.equal(outer["inner"](x)["third"], model(x)["third"])
    unsplit, _ = branching(seed=6)
    outer["inner"].load_state_dict(unsplit.state_dict())
    assert outer["inner"].partitions == unsplit.partitions
    assert torch.equal(outer["inner"](x)["third"], unsplit.eval()(x)["third"])


def test_copies_and_pickles() -> None:
    model, x = branching()
    model.split("5", PAIRS)
    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
        other.split("2", PAIRS)
        assert torch.equal(other(x)["second"], model(x)["second"])
        assert other.partitions != model.partitions


class TestOptimizerGroups:
    def groups(self, model: BranchingModel) -> list[dict[str, Any]]:
        norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        return [{"params": weights, "weight_decay": 0.1, "lr": 0.3}, {"params": norms, "weight_decay": 0.0}]

    def test_copies_join_the_group_in_the_order_of_the_model(self) -> None:
        model, _ = branching()
        optimizer = torch.optim.AdamW(self.groups(model), lr=0.01)
        optimizer.param_groups[0]["lr"] = 0.2  # a scheduler was here
        split_to_the_bottom(model, optimizer)
        expected = torch.optim.AdamW(self.groups(model), lr=0.01)
        for group, other in zip(optimizer.param_groups, expected.param_groups):
            assert [id(one) for one in group["params"]] == [id(one) for one in other["params"]]
        assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.01]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]

    def test_beside_parameters_of_others_and_with_names(self) -> None:
        model, _ = branching()
        outer = nn.ModuleDict({"before": nn.Linear(2, 2), "model": model, "behind": nn.Linear(2, 2)})
        optimizer = torch.optim.SGD(outer.named_parameters(), lr=0.1)
        split_to_the_bottom(model, optimizer)
        group, expected = optimizer.param_groups[0], list(outer.named_parameters())
        assert [id(one) for one in group["params"]] == [id(one) for _, one in expected]
        if "param_names" in group:  # of torch 2.6
            assert group["param_names"] == [name for name, _ in expected]

    def test_in_another_order_copies_follow_their_originals(self) -> None:
        model, _ = branching()
        optimizer = torch.optim.SGD(list(model.parameters())[::-1], lr=0.1)
        before = optimizer.param_groups[0]["params"][:]
        model.split("5", PAIRS, optimizer=optimizer)
        after = optimizer.param_groups[0]["params"]
        assert [id(one) for one in after if any(one is other for other in before)] == [id(one) for one in before]
        column, copied = model.stages[2][0], model.stages[2][1]
        for one, other in zip(column.parameters(), copied.parameters()):
            place = next(number for number, parameter in enumerate(after) if parameter is one)
            assert after[place + 1] is other

    def test_frozen_stages_stay_frozen_and_gradients_are_dropped(self) -> None:
        model, x = branching()
        for parameter in model.stages[1].parameters():
            parameter.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        loss_of(model(x)).backward()
        model.split(2, PAIRS, optimizer=optimizer)
        model.split(1, PAIRS, optimizer=optimizer)
        assert not any(parameter.requires_grad for parameter in model.stages[1].parameters())
        assert all(parameter.grad is None for parameter in model.stages[2].parameters())
        assert all(parameter.grad is not None for parameter in model.stages[0].parameters())
        known = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
        assert known == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_the_regularizer_reads_the_last_map_that_all_share() -> None:
    model, x = branching()
    heads = {task: f"heads.{task}" for task in TASKS}
    assert model.last_shared == "stages.2.0"
    regularizer = SaliencyRegularizer(model, heads, feature=model.last_shared)
    loss_of(model(x)).backward()
    with pytest.raises(ConfigurationError, match="reads what '5' makes"):
        model.split("5", PAIRS)
    assert len(model.stages[2]) == 1
    regularizer.remove()
    model.split("5", PAIRS)
    assert model.last_shared == "stages.1.0"
    regularizer = SaliencyRegularizer(model, heads, feature=model.last_shared, strength=1.0)
    outputs = model(x)
    assert float(regularizer().detach()) > 0
    (loss_of(outputs)).backward()
    regularizer.remove()
    model.split("2", PAIRS)
    model.split("0", PAIRS)
    assert model.last_shared is None


def test_the_table() -> None:
    model, _ = branching()
    model.split("5", PAIRS)
    assert model.describe().splitlines() == [
        "stage  columns                          parameters",
        "heads  first | second | third | fourth          28",
        "5      first, third | second, fourth            84",
        "2      first, second, third, fourth             54",
        "0      first, second, third, fourth             36",
        "total                                          202",
    ]


class TestRefused:
    @pytest.mark.parametrize(
        ("stage", "partition", "error", "words"),
        [
            ("5", [["first"], ["second", "third"]], TaskError, "fourth"),
            ("5", [["first"], ["first", "second", "third", "fourth"]], TaskError, "first"),
            ("5", [["first", "fifth"], ["second", "third", "fourth"]], TaskError, "fifth"),
            ("7", PAIRS, ModuleNotFoundInModelError, "Pass one of \\['0', '2', '5'\\]"),
            (3, PAIRS, ModuleNotFoundInModelError, "from 0 to 2"),
            ("0", PAIRS, ConfigurationError, "above '0'.*split that stage first"),
            ("5", [[*TASKS]], ConfigurationError, "cannot join them again"),
            ("2", [["first", "second"], ["third", "fourth"]], ConfigurationError, "above '2'"),
        ],
    )
    def test_groups_and_stages(self, stage: Any, partition: Any, error: type[Exception], words: str) -> None:
        model, _ = branching()
        model.split("5", PAIRS)
        before = model.describe()
        with pytest.raises(error, match=words):
            model.split(stage, partition)
        assert model.describe() == before

    def test_optimizers(self) -> None:
        model, _ = branching()
        other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
        for optimizer, words in (
            (other, "no parameter of this model"),
            (torch.optim.LBFGS(model.parameters()), "LBFGS"),
        ):
            with pytest.raises(ConfigurationError, match=words):
                model.split("5", PAIRS, optimizer=optimizer)
        with pytest.raises(WrongTypeError, match="optimizer"):
            model.split("5", PAIRS, optimizer="adam")
        assert len(model.stages[2]) == 1

    def test_state_dicts_of_other_models(self) -> None:
        model, x = branching()
        model.split("5", PAIRS)
        state = model.state_dict()
        for other in (branching(tasks=TASKS[::-1])[0], BranchingModel(branching_backbone(), heads(), x, cuts=["1"])):
            before = {name: value.clone() for name, value in other.state_dict().items()}
            with pytest.raises(StateMismatchError, match="was saved with the"):
                other.load_state_dict(state)
            assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
        broken = {**state, "tree.columns": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]])}
        with pytest.raises(StateMismatchError, match="is no tree"):
            branching()[0].load_state_dict(broken)

    def test_heads(self) -> None:
        backbone, x = branching_backbone(), torch.zeros(2, 5)
        with pytest.raises(TaskError, match="at least 2"):
            BranchingModel(backbone, {"one": nn.Linear(6, 1)}, x)
        with pytest.raises(TaskError, match="cannot have this name"):
            BranchingModel(backbone, {"a.b": nn.Linear(6, 1), "c": nn.Linear(6, 1)}, x)
        with pytest.raises(ConfigurationError, match="'b' has weights of the backbone"):
            BranchingModel(backbone, {"a": nn.Linear(6, 1), "b": backbone[5]}, x)
        with pytest.raises(ConfigurationError, match="'a' changes its input in place"):
            BranchingModel(backbone, {"a": nn.Sequential(nn.ReLU(inplace=True)), "b": nn.Linear(6, 1)}, x)
        with pytest.raises(WrongTypeError, match="mapping of task names"):
            BranchingModel(backbone, [nn.Linear(6, 1)], x)
        with pytest.raises(WrongTypeError, match="backbone must be"):
            BranchingModel(None, heads(), x)


def branching_backbone() -> Any:
    return BACKBONES["plain"]()[0]


def heads() -> dict[str, nn.Module]:
    return {task: nn.Linear(6, 1) for task in TASKS}


def test_a_regularizer_on_the_heads_alone_is_told_before_a_split() -> None:
    backbone = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    heads = {task: nn.Linear(6, 1) for task in ("a", "b", "c")}
    model = BranchingModel(backbone, heads, torch.randn(2, 5))
    regularizer = SaliencyRegularizer(model, "heads", strength=1.0)
    with pytest.raises(ConfigurationError, match="last_shared"):
        model.split(len(model.stage_names) - 1, [["a", "b"], ["c"]])
    regularizer.remove()
    model.split(len(model.stage_names) - 1, [["a", "b"], ["c"]])
