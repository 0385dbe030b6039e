"""Every wrong argument is refused with a typed error, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from saliency_reg import (
    AlreadyAttachedError,
    CaptureError,
    ConfigurationError,
    MissingArgumentError,
    NotConnectedError,
    RepMTL,
    SecondDerivativeError,
    ShapeError,
    TaskError,
    WrongTypeError,
)
from tests.support.attachment import is_clean
from tests.support.zoo import TASKS, VectorHeads

from .models import attached, losses_of, make, targets_of


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"task_specific_strength": -1.0}, ConfigurationError, "task_specific_strength"),
        ({"cross_task_strength": "much"}, WrongTypeError, "cross_task_strength"),
        ({"temperature": 0.0}, ConfigurationError, "temperature"),
        ({"warmup_steps": 1.5}, WrongTypeError, "warmup_steps"),
        ({"feature": ["backbone.0", "backbone.1"]}, ConfigurationError, "one feature map"),
        ({"cross_sample": "never"}, ConfigurationError, "cross_sample"),
        ({"custom_backward": "perhaps"}, ConfigurationError, "custom_backward"),
        ({"optimizer": "adam"}, WrongTypeError, "optimizer"),
        ({"process_group": "mine"}, ConfigurationError, "process_group"),
    ],
)
def test_options(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    model, _ = make("vector")
    with pytest.raises(kind, match=words):
        attached(model, **options)
    assert is_clean(model)


def test_what_is_no_model() -> None:
    with pytest.raises(WrongTypeError, match="Module"):
        RepMTL(None, heads="heads")


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda losses: None, MissingArgumentError, "losses"),
        (lambda losses: torch.stack(list(losses.values()), 1), WrongTypeError, "unbind"),
        (lambda losses: {task: loss.mean() for task, loss in losses.items()}, ShapeError, "reduction='none'"),
        (lambda losses: {task: loss.unsqueeze(1) for task, loss in losses.items()}, ShapeError, r"\[4, 1\]"),
        (lambda losses: {task: loss[:3] for task, loss in losses.items()}, ShapeError, r"\[4\]"),
        (lambda losses: {task: loss.detach() for task, loss in losses.items()}, NotConnectedError, "no graph"),
        (lambda losses: {**losses, "fourth": losses["first"]}, TaskError, "fourth"),
        (lambda losses: list(losses.values())[:2], TaskError, "2 entries"),
        (lambda losses: {**losses, "first": 1.0}, WrongTypeError, "float"),
        (lambda losses: {**losses, "first": losses["first"] - 1000}, ConfigurationError, "log_losses=False"),
    ],
)
def test_losses(change: Any, kind: type[Exception], words: str) -> None:
    model, x = make("vector")
    rep = attached(model)
    with pytest.raises(kind, match=words):
        rep(losses=change(losses_of(model(x), targets_of(4))))


def test_losses_that_do_not_come_from_the_feature_map() -> None:
    model, x = make("vector")
    rep = attached(model)
    losses = losses_of(model(x), targets_of(4))
    losses["second"] = torch.ones(4, dtype=torch.float64, requires_grad=True) * 2
    with pytest.raises(NotConnectedError, match="second"):
        rep(losses=losses)


def test_a_forward_is_read_once_and_needed() -> None:
    model, x = make("vector")
    rep = attached(model)
    losses = losses_of(model(x), targets_of(4))
    rep(losses=losses)
    with pytest.raises(CaptureError, match="read already"):
        rep(losses=losses)


def test_after_the_backward_pass() -> None:
    model, x = make("vector")
    rep = attached(model)
    losses = losses_of(model(x), targets_of(4))
    sum(loss.sum() for loss in losses.values()).backward()
    with pytest.raises(NotConnectedError, match="freed"):
        rep(losses=losses)


def test_two_on_one_model() -> None:
    model, _ = make("vector")
    attached_one = attached(model)
    with pytest.raises(AlreadyAttachedError):
        attached(model)
    attached_one.remove()


def test_a_head_without_second_derivative_is_named() -> None:
    class OnlyOnce(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * ctx.saved_tensors[0].cos()

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(OnlyOnce.apply(x))

    torch.manual_seed(0)
    model = VectorHeads(Head).double()
    rep = attached(model)
    with pytest.raises(SecondDerivativeError, match=TASKS[0]):
        rep(losses=losses_of(model(torch.randn(4, 5, dtype=torch.float64)), targets_of(4)))
