"""What surgery at the feature map cannot do, and says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, PCGrad, SaliencyRegularizer
from saliency_reg.errors import CaptureError, ConfigurationError, ShapeError, SurgeryError, WrongTypeError
from tests.reference.slow_fork import slow_step
from tests.support.zoo import TASKS, Reverse, build

from .support import assert_gradients, losses_of, pcgrad, with_heads


def hooked(x: Tensor) -> Tensor:
    view = x.view_as(x)
    view.register_hook(lambda gradient: 0.1 * gradient)
    return view


@pytest.mark.parametrize("change", [Reverse.apply, lambda x: x.detach().requires_grad_(), hooked])
@pytest.mark.parametrize("at", [0, 1])
def test_what_changes_a_gradient_in_front_of_a_head_is_refused(change: object, at: int) -> None:
    model = build("tanh heads").model
    model.from_feature = lambda feature: {
        task: head(change(feature) if TASKS.index(task) == at else feature) for task, head in model.heads.items()
    }
    FeatureSurgery(model, "heads")
    with pytest.raises(CaptureError, match="gradient reversal"):
        model(torch.randn(4, 5, dtype=torch.float64))


class ListHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.layer(maps[0].tanh())


class SecondArgumentHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, condition: Tensor, feature: Tensor) -> Tensor:
        return self.layer(feature.tanh()) * condition.sum()


@pytest.mark.parametrize(
    ("head", "call"),
    [
        (ListHead, lambda head, feature: head([feature])),
        (SecondArgumentHead, lambda head, feature: head(torch.ones(2, dtype=torch.float64), feature)),
    ],
)
def test_what_the_heads_share_in_another_place(head: type[nn.Module], call: object) -> None:
    model, inputs = with_heads(head, seed=3)
    model.from_feature = lambda feature: {task: call(each, feature) for task, each in model.heads.items()}
    expected = slow_step(model, inputs, losses_of, pcgrad)
    assert expected.conflicts > 0
    with FeatureSurgery(model, "heads"), pytest.raises(CaptureError, match="what the heads share"):
        model(inputs)
    surgery = FeatureSurgery(model, "heads", feature="backbone")
    sum(losses_of(model(inputs)).values()).backward()
    assert surgery.report is not None
    assert_gradients(model, expected)


def test_a_second_tensor_that_is_not_named_is_told() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, feature: Tensor, other: Tensor) -> Tensor:
            return self.layer(feature + other)

    model, inputs = with_heads(Head)
    model.from_feature = lambda feature: {task: head(feature, 2 * feature) for task, head in model.heads.items()}
    FeatureSurgery(model, "heads")
    with pytest.warns(UserWarning, match="also reads a tensor"):
        model(inputs)
    model(inputs)  # once


def test_tasks_one_after_the_other_are_refused() -> None:
    entry = build("tanh heads", seed=1)
    FeatureSurgery(entry.model, "heads")
    losses = losses_of(entry.model(entry.inputs))
    losses["first"].backward(retain_graph=True)
    with pytest.raises(SurgeryError, match=r"\['first'\] and of \['second'\] arrived in separate backward passes"):
        losses["second"].backward(retain_graph=True)
    # Looking at single tasks and then training on all of them is fine.
    sum(losses.values()).backward()


def test_heads_that_read_different_tensors_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

        def forward(self, x: Tensor) -> list[Tensor]:
            feature = self.backbone(x)
            return [head(nn.functional.dropout(feature)) for head in self.heads]

    model = Model()
    FeatureSurgery(model, "heads")
    with pytest.raises(CaptureError, match="all heads must read the same tensors"):
        model(torch.randn(3, 4))


def test_in_place_heads_are_refused() -> None:
    entry = build("in-place heads")
    FeatureSurgery(entry.model, "heads")
    with pytest.raises(CaptureError, match="inplace=False"):
        entry.model(entry.inputs)


@pytest.mark.parametrize(
    ("weighting", "error", "text"),
    [
        (PCGrad, WrongTypeError, "found the class PCGrad"),
        (0.5, WrongTypeError, "found float"),
        (lambda gramian: 1.0, WrongTypeError, "returned float"),
        (lambda gramian: gramian, ShapeError, r"returned the shape \[3, 3\]"),
        (lambda gramian: gramian[0, 1:], ShapeError, r"returned the shape \[2\]"),
    ],
)
def test_weightings_that_cannot_work(weighting: object, error: type[Exception], text: str) -> None:
    entry = build("tanh heads")
    with pytest.raises(error, match=text):
        FeatureSurgery(entry.model, "heads", weighting=weighting)
    assert not any(module._forward_pre_hooks for module in entry.model.modules())


def test_an_aggregator_that_is_no_weighted_sum() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    entry = build("tanh heads")
    with pytest.raises(WrongTypeError, match="no weighted sum"):
        FeatureSurgery(entry.model, "heads", weighting=aggregation.GradDrop())


def test_arguments_that_do_not_fit() -> None:
    entry = build("tanh heads")
    model = entry.model
    with pytest.raises(ConfigurationError, match="Both at once"):
        SaliencyRegularizer(
            model, "heads", surgery=FeatureSurgery(build("tanh heads").model, "heads"), strength=0.1, metric="l1"
        )
    with pytest.raises(ConfigurationError, match="can only be used with a model"):
        SaliencyRegularizer(None, tasks=["a", "b"], surgery=PCGrad(), strength=0.1, metric="l1")
    with pytest.raises(ConfigurationError, match="LBFGS evaluates a closure"):
        SaliencyRegularizer(
            model, "heads", surgery=PCGrad(), optimizer=torch.optim.LBFGS(model.parameters()), strength=0.1, metric="l1"
        )
    with pytest.raises(ConfigurationError, match="LBFGS evaluates a closure"):
        FeatureSurgery(model, "heads", optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(WrongTypeError, match=r"torch\.nn\.Module"):
        FeatureSurgery(model.parameters(), "heads")
    with pytest.raises(WrongTypeError, match="seed must be an int"):
        PCGrad(seed=0.5)
    with pytest.raises(ConfigurationError, match="64 bits"):
        PCGrad(seed=2**70)
    regularizer = SaliencyRegularizer(model, "heads", surgery=PCGrad(), strength=0.1, metric="l1")
    feature = torch.randn(3, 6, requires_grad=True)
    with pytest.raises(ConfigurationError, match="cannot be used under surgery"):
        regularizer(outputs={"first": feature.sum(1), "second": feature.sum(1)}, features=feature)
    assert "PCGrad (feature)" in regularizer.describe()
