"""Which tensor is differentiated: the one that is named, whoever else reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer

from .two_heads import SURGERY, Net, by_hand, found, mlp

pytestmark = pytest.mark.usefixtures("float64")


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, feature: Tensor, gate: Tensor) -> Tensor:
        return self.net(feature) * gate.mean(1, keepdim=True)


def raw(m: Any, x: Tensor) -> Any:
    m.meant = x
    return m.all(m.body(x).tanh() * m.side(x).sigmoid())


def flat(m: Any, x: Tensor) -> Any:
    m.meant = rows = x.flatten(1)
    return m.all(m.side(rows).tanh() * m.body(rows))


def read_before(m: Any, x: Tensor) -> Any:
    m.meant = x
    early = x[:, :1] * m.side(x)
    return m.all(m.body(x) + early)


def behind_frozen(m: Any, x: Tensor) -> Any:
    m.side.requires_grad_(False)
    m.meant = hidden = m.side(x)
    return m.all(hidden + m.gate(hidden).tanh())


def trained(m: Any, x: Tensor) -> Any:
    m.meant = hidden = m.side(x)
    return m.all(hidden * m.gate(hidden).tanh())


def gated_heads(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.inner(m.body(x))
    return m.all(feature, m.gate(feature))


def twice_in_one_head(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.inner(m.body(x))
    return m.all(feature, feature)


def nested(m: Any, x: Tensor) -> Any:
    m.meant = m.body(x)
    return m.all(m.inner(m.gate(m.meant)) + m.meant)


NAMED: dict[str, tuple[Any, str, tuple[int, ...], bool]] = {
    "a raw input": (raw, "body:input", (5, 3), False),
    "its second reader": (raw, "side:input", (5, 3), False),
    "a view of it": (flat, "body:input", (5, 3, 1), False),
    "an operation before": (read_before, "body:input", (5, 3), False),
    "behind a frozen layer": (behind_frozen, "gate:input", (5, 3), False),
    "behind a trained layer": (trained, "gate:input", (5, 3), False),
    "heads and a gate": (gated_heads, "inner", (5, 3), True),
    "one head twice": (twice_in_one_head, "inner", (5, 3), True),
    "a residual": (nested, "body", (5, 3), False),
}


@SURGERY
@pytest.mark.parametrize("case", NAMED)
def test_a_named_tensor_whoever_reads_it(case: str, surgery: bool) -> None:
    between, feature, shape, gated = NAMED[case]
    model, x = Net(between, [Gated(), Gated()] if gated else ()), torch.randn(shape)
    leaf = x.clone().requires_grad_()
    outputs = model(leaf)
    expected = by_hand(outputs, model.meant)
    assert found(model, x, surgery=surgery, feature=feature) == pytest.approx([expected] * 3, abs=1e-12)
    assert not x.requires_grad
    assert x.grad is None


class WithContext(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, feature: Tensor, context: Any = None) -> Tensor:
        hidden = self.first(feature)
        if isinstance(context, list):
            context = context[0]
        return self.last((hidden if context is None else hidden * context.sigmoid()).tanh())


CONTEXTS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "an argument": lambda head, feature, context: head(feature, context),
    "a keyword": lambda head, feature, context: head(feature, context=context),
    "in a list": lambda head, feature, context: head(feature, [context]),
}


@SURGERY
@pytest.mark.parametrize("whose", ["all", "last"])
@pytest.mark.parametrize("way", CONTEXTS)
def test_a_context_that_heads_are_given_later_on(way: str, whose: str, surgery: bool) -> None:
    """Made of the feature that is named, which the first forwards do not tell."""

    def between(m: Any, x: Tensor) -> Any:
        m.meant = feature = m.inner(m.body(x))
        context = m.gate(feature)
        given = [m.on and (whose == "all" or head is m.heads[-1]) for head in m.heads]
        return [CONTEXTS[way](head, feature, context) if own else head(feature) for head, own in zip(m.heads, given)]

    model, x = Net(between, [WithContext(), WithContext(), WithContext()]), torch.randn(5, 3)
    options: dict[str, Any] = {"surgery": PCGrad()} if surgery else {}
    expected, penalties = [], []
    for model.on in (False, True, False):
        outputs = model(x)
        expected.append(by_hand(outputs, model.meant))
    with SaliencyRegularizer(
        model, "heads", feature="inner", strength=1.0, **{"metric": "l1", **options}
    ) as regularizer:
        for model.on in (False, True, False):
            loss = sum(output.square().mean() for output in model(x))
            penalty = regularizer()
            (loss + penalty).backward()
            penalties.append(penalty.item())
    assert penalties == pytest.approx(expected, abs=1e-12)
    assert abs(expected[1] - expected[0]) > 1e-3


def test_what_is_read_twice_needs_no_name() -> None:
    model, x = Net(twice_in_one_head, [Gated(), Gated()]), torch.randn(5, 3)
    expected = by_hand(model(x), model.meant)
    for surgery in (False, True):
        assert found(model, x, surgery=surgery) == pytest.approx([expected] * 3, abs=1e-12)


def test_no_graph_of_a_frozen_backbone_after_the_first_forward() -> None:
    seen = []

    def alone(m: Any, x: Tensor) -> Any:
        m.side.requires_grad_(False)
        hidden = m.side(x)
        seen.append(hidden.requires_grad)
        return m.all(m.gate(hidden))

    model, x = Net(alone), torch.randn(5, 3)
    first, second, third = found(model, x, feature="gate:input")
    assert seen == [True, False, False]
    assert first == second == third > 0


def test_a_named_input_that_nobody_can_follow() -> None:
    def under_no_grad(m: Any, x: Tensor) -> Any:
        with torch.no_grad():
            hidden = m.side(x)
        return m.all(m.gate(hidden))

    with pytest.warns(UserWarning, match=r"'gate:input' does not require grad.*Name the module whose output"):
        found(Net(under_no_grad), torch.randn(5, 3), feature="gate:input")


def test_under_surgery_nested_names_count_once() -> None:
    grads = []
    for surgery in (False, True):
        torch.manual_seed(0)
        model = Net(nested)
        regularizer = SaliencyRegularizer(
            model,
            heads="heads",
            strength=1.0,
            feature=["body", "inner"],
            surgery=PCGrad() if surgery else None,
            metric="l1",
        )
        model(torch.randn(5, 3))
        regularizer().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
