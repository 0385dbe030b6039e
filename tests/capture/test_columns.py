"""Heads with several columns for each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, PCGrad, SaliencyRegularizer
from saliency_reg.errors import ConfigurationError, TaskError, WrongTypeError

from .heads import TASKS, expected_penalty


class Joint(nn.Module):
    """One layer for all tasks behind a backbone; ``shaped`` makes something of its output."""

    def __init__(self, columns: int, shaped: Callable[[Tensor], Tensor] = lambda x: x, smooth: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        layer = nn.Linear(5, columns)
        self.head = Shaped(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), layer) if smooth else layer, shaped)
        self.fc = nn.Linear(5, columns)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Shaped(nn.Module):
    def __init__(self, net: nn.Module, shaped: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.shaped = net, shaped

    def forward(self, x: Tensor) -> Tensor:
        return self.shaped(self.net(x))


GROUPS: dict[str, Any] = {
    "slices": {"a": slice(0, 4), "b": slice(4, 8), "c": slice(8, 12)},
    "of several sizes, with some for nobody": {"a": slice(1, 4), "b": 5, "c": [6, 9, 11]},
    "every third": {"a": slice(0, None, 3), "b": range(1, 12, 3), "c": slice(-10, None, 3)},
}


def columns_of(given: Mapping[str, Any], width: int) -> list[list[int]]:
    every = list(range(width))
    return [
        every[own] if isinstance(own, slice) else [own] if isinstance(own, int) else list(own) for own in given.values()
    ]


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_columns(name: str, smooth: bool) -> None:
    torch.manual_seed(0)
    model, x = Joint(12, smooth=smooth).double(), torch.randn(4, 4).double()
    regularizer = SaliencyRegularizer(model, "head.net", columns=GROUPS[name], strength=1.0, metric="l1")
    model(x)
    penalty = regularizer()
    own = columns_of(GROUPS[name], 12)
    expected = expected_penalty(model.backbone(x), lambda shared: [model.head(shared)[:, each] for each in own])
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)
    assert regularizer.tasks == ("a", "b", "c")


@pytest.mark.parametrize(
    ("shaped", "parts"),
    [
        (lambda out: out.unflatten(1, (3, 4)), lambda out: out.unbind(1)),
        (lambda out: out.unflatten(1, (4, 3)).transpose(1, 2), lambda out: out.unbind(1)),
    ],
)
def test_a_row_for_each_task(shaped: Any, parts: Any) -> None:
    torch.manual_seed(0)
    model, x = Joint(12, shaped).double(), torch.randn(4, 4).double()
    regularizer = SaliencyRegularizer(model, "head", tasks=TASKS, strength=1.0, metric="l1")
    model(x)
    penalty = regularizer()
    expected = expected_penalty(model.backbone(x), lambda shared: parts(model.head(shared)))
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)


def test_rows_and_groups_of_dense_outputs() -> None:
    """[B, T, K, H, W] and [B, T * K, H, W] are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, 6, 1), nn.Identity()).double()
    x, found = torch.randn(2, 2, 3, 3).double(), []
    model[2:3].append(nn.Unflatten(1, (3, 2)))
    with_rows = nn.Sequential(model[0], model[1], nn.Sequential(model[2], nn.Unflatten(1, (3, 2))))
    groups = {task: slice(2 * index, 2 * index + 2) for index, task in enumerate(TASKS)}
    for each, options in ((model, {"columns": groups}), (with_rows, {"tasks": TASKS})):
        with SaliencyRegularizer(each, "2", strength=1.0, **{"metric": "l1", **options}) as regularizer:
            each(x)
            found.append(regularizer())
    assert found[0] > 0
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["closed form", "smooth", "rows"])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_columns_under_surgery(name: str, kind: str) -> None:
    """Gramian and gradient are those of separate outputs."""
    torch.manual_seed(0)
    if kind == "rows":
        model = Joint(12, lambda out: out.unflatten(1, (3, 4))).double()
        options: dict[str, Any] = {"heads": "head", "tasks": TASKS}
        own = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    else:
        model = Joint(12, smooth=kind == "smooth").double()
        options = {"heads": "head.net", "columns": GROUPS[name]}
        own = columns_of(GROUPS[name], 12)
    x, target = torch.randn(4, 4).double(), torch.randn(4, 12).double()
    weights = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    gramians = []

    def weighting(gramian: Tensor) -> Tensor:
        gramians.append(gramian)
        return weights

    def error(out: Tensor) -> Tensor:
        return (out.flatten(1) - target).square()

    surgery = FeatureSurgery(model, weighting=weighting, **options)
    error(model(x)).sum().backward()
    surgery.remove()
    found = [parameter.grad.clone() for parameter in model.backbone.parameters()]
    shared = model.backbone(x)
    errors = error(model.head(shared))
    losses = [errors[:, each].sum() for each in own]
    gradients = [torch.autograd.grad(loss, shared, retain_graph=True)[0].flatten() for loss in losses]
    torch.testing.assert_close(
        gramians[-1].double(), torch.stack([torch.stack([g @ h for h in gradients]) for g in gradients])
    )
    nobody = errors.sum() - sum(losses)
    total = nobody + sum(weight * loss for weight, loss in zip(weights, losses))
    for own_gradient, expected in zip(found, torch.autograd.grad(total, list(model.backbone.parameters()))):
        torch.testing.assert_close(own_gradient, expected)


def test_columns_with_the_penalty_under_surgery() -> None:
    torch.manual_seed(0)
    model, x = Joint(12).double(), torch.randn(4, 4).double()
    penalties = []
    for surgery in (None, PCGrad()):
        options = {"columns": GROUPS["slices"], "strength": 1.0, "surgery": surgery}
        with SaliencyRegularizer(model, "head.net", **{"strength": 0.1, "metric": "l1", **options}) as regularizer:
            out = model(x)
            penalties.append(regularizer())
            (out.square().mean() + penalties[-1]).backward()
    torch.testing.assert_close(penalties[0], penalties[1])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"heads": "fc", "tasks": TASKS}, TaskError, r"columns=\{'a': slice\(0, 4\), ...\}.*outputs="),
        (
            {"heads": "fc", "columns": {"a": slice(0, 4), "b": slice(3, 8)}},
            TaskError,
            "column 3 to the tasks 'a' and 'b'",
        ),
        ({"heads": "fc", "columns": {"a": slice(0, 4), "b": slice(4, 13)}}, TaskError, r"'b'.*12 columns"),
        ({"heads": "fc", "columns": {"a": 0, "b": 12}}, TaskError, r"'b' are 12.*12 columns"),
        ({"heads": "fc", "columns": {"a": 0, "b": []}}, TaskError, "at least one"),
        ({"heads": "fc", "columns": {"a": 0, "b": "x"}}, WrongTypeError, "'b' must be a slice"),
        ({"heads": "fc", "columns": 4}, WrongTypeError, "columns must be a mapping"),
        ({"heads": "fc", "columns": {"a": 0}}, TaskError, "at least 2"),
        ({"heads": "fc", "columns": {"a": 0, "b": 1}, "tasks": ["b", "a"]}, TaskError, "Leave tasks= out"),
        ({"heads": ["fc", "head"], "columns": {"a": 0, "b": 1}}, TaskError, "columns= are those of one head"),
        ({"columns": {"a": 0, "b": 1}}, TypeError, "heads='fc'"),
        ({"heads": {"a": "fc", "b": "fc"}}, TaskError, "heads='fc', columns="),
    ],
)
def test_columns_that_cannot_be(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SaliencyRegularizer(Joint(12), **{"strength": 0.1, "metric": "l1", **options})
    with pytest.raises(ConfigurationError, match="columns= can only be used with a model"):
        SaliencyRegularizer(None, columns={"a": 0, "b": 1}, tasks=["a", "b"], strength=0.1, metric="l1")
