"""Heads that are chains of modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from saliency_reg.errors import ConfigurationError, HeadNotFoundError, TaskError, WrongTypeError

from .heads import TASKS, Named, Towers, expected_penalty


class Layered(Towers):
    """All towers run before the last layers do, and return the same."""

    def of(self, shared: Tensor) -> list[Tensor]:
        hidden = [tower(shared) for tower in self.towers]
        return [last(torch.relu(one)) for last, one in zip(self.last, hidden)]


def by_index(first: str, last: str, keys: Sequence[Any] = range(3)) -> dict[str, list[str]]:
    return {task: [f"{first}.{key}", f"{last}.{key}"] for task, key in zip(TASKS, keys)}


BRANCHES: dict[str, tuple[Callable[[], Any], Any]] = {
    "lists": (Towers, by_index("towers", "last")),
    "dictionaries": (lambda: Towers(3, nn.ModuleDict), by_index("towers", "last", TASKS)),
    "layer by layer": (Layered, by_index("towers", "last")),
    "three modules": (Named, {t: [f"tower_{t}", f"middle_{t}", f"out_{t}"] for t in TASKS}),
    "a list of lists": (lambda: Towers(2), list(by_index("towers", "last").values())),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_a_list_of_modules_is_one_head(name: str) -> None:
    torch.manual_seed(0)
    make, heads = BRANCHES[name]
    model, x = make().double(), torch.randn(4, 4).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with SaliencyRegularizer(model, heads, strength=1.0, metric="l1") as regularizer:
            model(x)
            penalty = regularizer()
    torch.testing.assert_close(penalty.double(), expected_penalty(model.bottom(x), model.of), rtol=1e-6, atol=0)
    assert all(head in set(model.modules()) for head in regularizer.heads)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", BRANCHES)
def test_a_list_of_modules_is_one_head_under_surgery(name: str) -> None:
    """The backbone's gradient is that of explicit PCGrad at the map, and the penalty's beside it."""
    torch.manual_seed(0)
    make, heads = BRANCHES[name]
    model, x = make().double(), torch.randn(4, 4).double()
    plain = copy.deepcopy(model)

    def losses(outputs: Sequence[Tensor]) -> list[Tensor]:
        return [(output - 2 * index).square().mean() for index, output in enumerate(outputs)]

    weights = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    regularizer = SaliencyRegularizer(model, heads, strength=0.3, surgery=lambda gramian: weights, metric="l1")
    (sum(losses(model(x))) + regularizer()).backward()

    other = SaliencyRegularizer(plain, heads, strength=0.3, metric="l1")
    outputs = plain(x)
    penalty = other()
    (sum(weight * loss for weight, loss in zip(weights, losses(outputs))) + penalty).backward()
    for own, its in zip(model.bottom.parameters(), plain.bottom.parameters()):
        torch.testing.assert_close(own.grad, its.grad)


def test_branches_of_which_some_do_not_run() -> None:
    torch.manual_seed(0)
    model, x = Towers().double(), torch.randn(4, 4).double()
    regularizer = SaliencyRegularizer(model, by_index("towers", "last"), strength=1.0, metric="l1")
    hidden = [tower(model.bottom(x)) for tower in model.towers]  # all begin, of one forward each
    regularizer._capture.drop()
    shared = model.bottom(x)
    hidden = [tower(shared) for tower in model.towers]
    for index in (0, 2):
        model.last[index](hidden[index])
    regularizer()
    assert regularizer.report.distances[0, 2] > 0
    assert regularizer.report.distances[0, 1].isnan()


@pytest.mark.parametrize(
    ("heads", "error", "text"),
    [
        (
            {"a": ["bottom", "last.0"], "b": ["bottom", "last.1"]},
            TaskError,
            "'bottom' was given twice.*what heads share",
        ),
        ({"a": ["towers.0", "towers.0.0"], "b": "last.1"}, TaskError, "is part of head"),
        ({"a": [], "b": "last.1"}, HeadNotFoundError, "empty list"),
        ({"a": ["towers", "last"], "b": "last.1"}, TaskError, "is part of head"),
        (["towers", "last"], HeadNotFoundError, r"'towers' is a ModuleList.*\['towers.0', 'last.0'\]"),
        ({"a": ["towers.0", 3], "b": "last.1"}, WrongTypeError, "found int"),
    ],
)
def test_lists_that_are_no_heads(heads: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SaliencyRegularizer(Towers(), heads, strength=0.1, metric="l1")


def test_branches_cannot_be_run_by_themselves() -> None:
    with pytest.raises(ConfigurationError, match="run_all_heads"):
        SaliencyRegularizer(Towers(), by_index("towers", "last"), run_all_heads=True, strength=0.1, metric="l1")


# Hidden layers that are given as heads.


@pytest.mark.parametrize(
    ("make", "heads"),
    [
        (Towers, "towers"),
        (lambda: Towers(3, nn.ModuleDict), "towers"),
        (Layered, ["towers.0", "towers.1", "towers.2"]),
        (Named, [f"tower_{task}" for task in TASKS]),
        (Named, "tower_?"),
    ],
)
def test_heads_that_go_on_are_followed_to_their_outputs(make: Any, heads: Any) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(4, 4).double()
    expected = expected_penalty(model.bottom(x), model.of)
    regularizer = SaliencyRegularizer(model, heads, strength=1.0, metric="l1")
    with pytest.warns(UserWarning, match="ends in a hidden layer.*To say so, pass heads="):
        model(x)
    torch.testing.assert_close(regularizer().double(), expected, rtol=1e-6, atol=0)


def test_a_list_says_where_a_head_ends() -> None:
    torch.manual_seed(0)
    model, x = Towers().double(), torch.randn(4, 4).double()
    regularizer = SaliencyRegularizer(
        model, {task: [f"towers.{i}"] for i, task in enumerate(TASKS)}, strength=1.0, metric="l1"
    )
    model(x)
    with pytest.warns(UserWarning, match=r"'last.0'.*read the outputs of heads.*pass a list"):
        penalty = regularizer()
    expected = expected_penalty(model.bottom(x), lambda shared: [tower(shared) for tower in model.towers])
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Linear(4, 5)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 6) for task in TASKS})
        self.proj = nn.ModuleDict({task: nn.Linear(5, 6) for task in TASKS})
        self.fusion = nn.Linear(18, 1)

    def forward(self, x: Tensor) -> Any:
        shared = self.bottom(x)
        outputs = [head(shared) for head in self.heads.values()]
        return {"all": [self.fusion(torch.cat(outputs, 1).relu())], "beside": [p(shared) for p in self.proj.values()]}


def test_what_reads_the_heads_is_told_once() -> None:
    model = Fused()
    regularizer = SaliencyRegularizer(model, "heads", strength=0.1, metric="l1")
    model(torch.randn(3, 4))
    with pytest.warns(UserWarning, match="'fusion' read the outputs of heads, 'fusion' that of 'heads") as caught:
        regularizer()
    assert "proj" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(3, 4))
        regularizer()


def test_heads_that_nothing_reads_are_not_told_of() -> None:
    """Not of modules beside the heads either, with names and widths that would fit."""

    class Beside(Fused):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({task: nn.Linear(5, 5) for task in TASKS})

        def forward(self, x: Tensor) -> Any:
            shared = self.bottom(x)
            outputs = [head(shared) for head in self.heads.values()]
            return outputs, [proj(shared) for proj in self.proj.values()]

    torch.manual_seed(0)
    model, x = Beside().double(), torch.randn(3, 4).double()
    regularizer = SaliencyRegularizer(model, "heads", strength=1.0, metric="l1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        penalty = regularizer()
    expected = expected_penalty(model.bottom(x), lambda shared: [head(shared) for head in model.heads.values()])
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)
