"""Which tensor is differentiated where it is changed in place later on: as its twin that makes new tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer
from saliency_reg.errors import CaptureError

from .two_heads import SURGERY, Net, by_hand, found, mlp, rows

pytestmark = pytest.mark.usefixtures("float64")


def tokens(m: Any, x: Tensor) -> Any:
    seen = m.body(x)  # [B, L, C], a view of what addmm returned
    context = m.gate(seen.mean(1))
    return m.all(m.act(seen).mean(1) + context)


def residual(m: Any, x: Tensor) -> Any:
    seen = m.body(x)
    step = seen.mean(1, keepdim=True).tanh()
    seen = seen.add_(step) if m.inplace else seen + step
    return m.all((seen * seen).mean(1))


def turned(m: Any, x: Tensor) -> Any:
    seen = m.turn(m.body(x))  # [B, C, L]
    return m.all(m.act(seen).square().mean(2))


def plain_map(m: Any, x: Tensor) -> Any:
    seen = m.inner(m.body(x))
    return m.all(m.times(seen, 3.0).mean(1))


IN_PLACE: dict[str, tuple[Any, str]] = {
    "tokens": (tokens, "body"),
    "a residual of tokens": (residual, "body"),
    "a transposed view": (turned, "turn"),
    "a map": (plain_map, "inner"),
}


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@SURGERY
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("case", IN_PLACE)
def test_a_feature_that_is_changed_in_place(case: str, frozen: bool, surgery: bool) -> None:
    between, feature = IN_PLACE[case]
    model, x = Net(between), torch.randn(5, 2, 3)
    model.turn = Turn()
    model.body.requires_grad_(not frozen)
    twin = copy.deepcopy(model)
    twin.inplace = True
    twin.act = nn.ReLU(inplace=True)
    options: dict[str, Any] = (
        {"feature": feature, "channel_axis": 1} if case == "a transposed view" else {"feature": feature}
    )
    expected = found(model, x, **options)
    assert found(twin, x, surgery=surgery, **options) == pytest.approx(expected, abs=1e-12)
    if not surgery:
        for one, other in zip(model.parameters(), twin.parameters()):
            if one.grad is not None or other.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=0)


def each_flattens(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.body(x)
    return [head(feature.flatten(1)) for head in m.heads]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(("between", "shape"), [(rows, (5, 3)), (rows, (5, 2, 3)), (each_flattens, (5, 1, 3))])
def test_heads_that_begin_in_place(between: Any, shape: tuple[int, ...], frozen: bool) -> None:
    model, x = Net(between, [mlp(nn.ReLU(inplace=True)), mlp(), mlp(nn.Tanh())]), torch.randn(shape)
    feature = model.body(x).detach().requires_grad_()
    read = feature.flatten(1) if between is each_flattens else feature
    outputs = [head[1:](read.relu()) if place == 0 else head(read.relu()) for place, head in enumerate(model.heads)]
    model.body.requires_grad_(not frozen)
    assert found(model, x) == pytest.approx([by_hand(outputs, feature)] * 3, abs=1e-12)


@SURGERY
def test_one_head_that_begins_in_place(surgery: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), mlp(nn.ReLU(inplace=True), outputs=3))
    x = torch.randn(5, 1, 3)
    feature = model[:2](x).detach().requires_grad_()
    expected = by_hand([column.unsqueeze(1) for column in model[2][1:](feature.relu()).unbind(1)], feature)
    options: dict[str, Any] = {"surgery": PCGrad()} if surgery else {}
    regularizer = SaliencyRegularizer(model, heads="2", tasks=list("abc"), strength=1.0, **{"metric": "l1", **options})
    loss = model(x).square().sum()
    penalty = regularizer()
    (loss + penalty).backward()
    assert penalty.item() == pytest.approx(expected, abs=1e-12)


def between_heads(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.inner(m.body(x))
    outputs = []
    for factor, head in enumerate(m.heads, 1):
        feature = m.times(feature, factor)
        outputs.append(head(feature))
    return outputs


def after_one_head(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.inner(m.body(x))
    first = m.heads[0](feature)
    return [first, m.heads[1](m.times(feature, 3.0))]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("between", [between_heads, after_one_head])
def test_a_map_that_is_changed_between_heads(between: Any, frozen: bool) -> None:
    model, x = Net(between, [mlp(Scaled()), mlp(Scaled())]), torch.randn(5, 3)
    expected = by_hand(model(x), model.meant)
    model.inplace = True
    model.body.requires_grad_(not frozen)
    with pytest.raises(CaptureError, match=r"changed in place.*after head 'heads.0' and before 'heads.1'.*feature="):
        found(model, x)
    assert found(model, x, feature="inner") == pytest.approx([expected] * 3, abs=1e-12)
    if not frozen:
        with pytest.raises(CaptureError, match="changed in place"):
            found(model, x, surgery=True)


class Scaled(nn.Module):
    """Saves nothing of what it reads, which autograd would miss."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


# Outputs that are changed in place.


class Late(nn.Module):
    """Each head's output is changed in place by the model."""

    def __init__(self, change: Callable[[Tensor], Any], outputs: int) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.heads = nn.ModuleList([mlp(outputs=outputs), mlp(outputs=outputs)])
        self.change = change

    def forward(self, x: Tensor) -> list[Tensor]:
        feature = self.body(x)
        outputs = [head(feature) for head in self.heads]
        for output in outputs:
            self.change(output)
        return outputs


@SURGERY
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    "change", [lambda out: out.add_(7.0), lambda out: out.mul_(-3.0), lambda out: out[:, 0].sigmoid_()]
)
def test_outputs_that_are_changed_in_place(change: Any, outputs: int, surgery: bool) -> None:
    model, x = Late(change, outputs), torch.randn(5, 3)
    unchanged = copy.deepcopy(model)
    unchanged.change = lambda output: None
    assert found(model, x, surgery=surgery) == pytest.approx(found(unchanged, x), abs=1e-12)


def test_an_output_that_is_changed_in_place_later_on() -> None:
    model, x = Late(lambda output: None, 1), torch.randn(5, 3)
    regularizer = SaliencyRegularizer(model, heads="heads", strength=0.1, metric="l1")
    model(x)
    regularizer()
    model.change = lambda output: output.add_(1.0)
    model(x)
    with pytest.raises(CaptureError, match=r"pass output=lambda out: out.clone\(\)"):
        regularizer()
    model(x)
    regularizer()  # from now on a copy is kept
    regularizer.remove()
    regularizer = SaliencyRegularizer(model, heads="heads", output=lambda out: out.clone(), strength=0.1, metric="l1")
    model(x)
    regularizer()
