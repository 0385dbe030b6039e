"""What cannot work is refused, and the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from saliency_reg import (
    CaptureError,
    ConfigurationError,
    HeadNotFoundError,
    NonFiniteError,
    SaliencyRegError,
    SelectiveSharing,
    ShapeError,
    TaskError,
    WrongTypeError,
    share_estimators,
)

from .support import Model, batch, losses, same, sgd, train

ABC = ("a", "b", "c")


def heads_of(make: Callable[[str], nn.Module]) -> nn.Module:
    return nn.ModuleDict({"heads": nn.ModuleDict({task: make(task) for task in ABC})})


def two_layers(width: int = 3, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), activation(), nn.Linear(width, 1))


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.estimator, self.output = nn.Linear(4, 3), nn.Linear(3, 1)


def frozen(task: str) -> nn.Module:
    head = two_layers()
    head[0].requires_grad_(task != "b")
    return head


def tied() -> nn.Module:
    model = heads_of(lambda task: two_layers())
    model["heads"]["b"][0].weight = model["heads"]["a"][0].weight
    return model


MODELS = [
    (lambda: heads_of(lambda task: nn.Linear(4, 1)), ConfigurationError, "'heads.a' is a Linear without an estimator"),
    (
        lambda: heads_of(lambda task: nn.Sequential(nn.Flatten(), nn.Linear(4, 1))),
        ConfigurationError,
        "'heads.a' is a Sequential without an estimator",
    ),
    (lambda: heads_of(lambda task: Opaque()), ConfigurationError, "estimators='estimator'"),
    (
        lambda: heads_of(lambda task: two_layers(4 if task == "c" else 3)),
        ShapeError,
        "'heads.c.0 to heads.c.1' is not built like 'heads.a.0 to heads.a.1': 0.weight [4, 4] beside [3, 4]",
    ),
    (lambda: heads_of(lambda task: two_layers(3, nn.Tanh if task == "b" else nn.ReLU)), ShapeError, "'Tanh'"),
    (lambda: heads_of(frozen), ConfigurationError, "'heads.b.0 to heads.b.1' is frozen"),
    (tied, TaskError, "share a weight"),
    (
        lambda: heads_of(lambda task: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))),
        ConfigurationError,
        "Run the model once",
    ),
    (
        lambda: heads_of(lambda task: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1))),
        ConfigurationError,
        "weight matrix",
    ),
    (lambda: 3, WrongTypeError, "nn.Module"),
]


@pytest.mark.parametrize(("make", "error", "words"), MODELS)
def test_models(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    model = make()
    with pytest.raises(error) as caught:
        SelectiveSharing(model, heads="heads")
    assert words in str(caught.value)
    assert isinstance(caught.value, SaliencyRegError)


OPTIONS = [
    ({"heads": "haeds"}, HeadNotFoundError, "haeds"),
    ({"heads": "heads.a.0", "tasks": ["x", "y", "z"]}, ConfigurationError, "one head of all tasks"),
    ({"estimators": "inner"}, HeadNotFoundError, "'inner'"),
    ({"estimators": 3}, WrongTypeError, "mapping {task: name or module}"),
    ({"estimators": {"a": "heads.a.0", "b": "heads.b.0"}}, ConfigurationError, "heads= has no use"),
    ({"heads": None, "estimators": {"a": "heads.a.0", "b": "heads"}}, HeadNotFoundError, "around several"),
    ({"heads": None, "estimators": {"a": "heads.a.0", "b": nn.Linear(4, 3)}}, HeadNotFoundError, "not in the model"),
    ({"heads": None, "estimators": {"a": "heads.a.0"}, "tasks": ["a", "b"]}, TaskError, "lacks ['b']"),
    ({"heads": None, "estimators": {"a": "heads.a.0"}}, TaskError, "at least 2"),
    ({"compare": "outputs"}, ConfigurationError, "'inputs', 'gradients'"),
    ({"energy": 0.0}, ConfigurationError, "energy"),
    ({"energy": 1.5}, ConfigurationError, "(0, 1]"),
    ({"optimizer": "sgd"}, WrongTypeError, "torch.optim.Optimizer"),
    (
        {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])},
        ConfigurationError,
        "'0.weight' of the estimator 'heads.a",
    ),
]


@pytest.mark.parametrize(("options", "error", "words"), OPTIONS)
def test_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = heads_of(lambda task: two_layers())
    before = copy.deepcopy(model)
    with pytest.raises(error) as caught:
        SelectiveSharing(model, **{"heads": "heads", **options})
    assert words in str(caught.value)
    assert same(model, before)
    if isinstance(options.get("optimizer"), torch.optim.Optimizer):
        assert not options["optimizer"]._optimizer_step_post_hooks


def test_wrapped_models_are_refused() -> None:
    class DistributedDataParallel(nn.Module):  # by its name; a real one needs a process group, see test_two_processes
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(ConfigurationError, match="Pass the model inside, model.module"):
        SelectiveSharing(DistributedDataParallel(heads_of(lambda task: two_layers())), heads="module.heads")


def test_trained_estimators_are_not_overwritten() -> None:
    model = Model(("a0", "b0", "c0")).double()
    optimizer = sgd(model)
    train(model, optimizer, range(2))
    before = copy.deepcopy(model)
    with pytest.raises(ConfigurationError, match="has state of 'heads.a0.0 to heads.a0.1'.* Leave it out"):
        SelectiveSharing(model, heads="heads", optimizer=optimizer, same_start=True)
    assert same(model, before)
    assert not optimizer._optimizer_step_post_hooks
    share_estimators(model, [("a0", "b0"), ("c0",)], heads="heads").remove()
    with pytest.raises(ConfigurationError, match="share estimators already"):
        SelectiveSharing(model, heads="heads", same_start=True)


@pytest.mark.parametrize(
    ("groups", "error", "words"),
    [
        ([["a0", "b0"], ["c0"]], TaskError, "a1"),
        ([["a0", "b0", "c0", "x"], ["a1"]], TaskError, "'x'"),
        ([["a0", "b0", "c0"], ["c0", "a1"]], TaskError, "several groups"),
        ([["a0", "b0", "c0"], ["a1"], []], TaskError, "without tasks"),
        ([["a0"], ["b0", "c0", "a1"]], TaskError, "'a0' and 'b0' share an estimator already"),
        ("a0", WrongTypeError, "list of lists"),
    ],
)
def test_groups(groups: Any, error: type[Exception], words: str) -> None:
    model = Model(("a0", "b0", "c0", "a1")).double()
    optimizer = sgd(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
    train(model, optimizer, range(2))
    sharing.share([["a0", "b0"], ["c0"], ["a1"]])
    train(model, optimizer, range(2))
    before = copy.deepcopy(model)
    held = [list(group["params"]) for group in optimizer.param_groups]
    with pytest.raises(error) as caught:
        sharing.share(groups)
    assert words in str(caught.value)
    assert same(model, before)
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [list(map(id, own)) for own in held]
    assert sharing.grouping == (("a0", "b0"), ("c0",), ("a1",))
    assert int(sharing.gathered.steps) == 2


def test_known_groups_that_cannot_be_leave_no_hook() -> None:
    model = Model(("a0", "b0", "c0"))
    optimizer = sgd(model)
    with pytest.raises(TaskError):
        share_estimators(model, [["a0", "b0"]], heads="heads", optimizer=optimizer)
    assert not optimizer._optimizer_step_post_hooks
    assert model.heads["a0"][0] is not model.heads["b0"][0]


def test_arguments_of_groups() -> None:
    model = Model().double()
    optimizer = sgd(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
    with pytest.raises(CaptureError, match="no gradients"):
        sharing.groups()
    optimizer.step()  # without a backward pass
    with pytest.raises(CaptureError, match="no gradients"):
        sharing.similarity()
    train(model, optimizer, range(2))
    for options, error in (
        ({"theta": -0.1}, ConfigurationError),
        ({"theta": float("nan")}, ConfigurationError),
        ({"theta": "0.3"}, WrongTypeError),
        ({"directive": "variety"}, ConfigurationError),
    ):
        with pytest.raises(error, match="theta|similarity"):
            sharing.groups(**options)
    sharing.remove()
    with pytest.raises(CaptureError, match="attached to no model"):
        sharing.share([[task] for task in sharing.tasks])


def test_gradients_that_are_not_finite_are_named() -> None:
    model = Model().double()
    optimizer = sgd(model)
    sharing = SelectiveSharing(model, heads="heads", optimizer=optimizer)
    x = batch(0)
    own = losses(model(x), x)
    (own["a0"] + own["b1"] * float("inf")).backward()
    optimizer.step()
    with pytest.raises(NonFiniteError, match="'?b1'? have NaN or infinity"):
        sharing.groups()
