"""Named feature maps: through which ways their gradient is taken, and that none counts twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from tests.reference.slow import slow_distances

pytestmark = pytest.mark.usefixtures("float64")


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.gate = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)), nn.Linear(4, 1)

    def forward(self, feature: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.net(feature) if gate is None else self.net(feature) * self.gate(gate)


class Net(nn.Module):
    def __init__(self, between: Callable[[Any, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.body, self.act, self.side, self.turn = nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 4), Turn()
        self.drop, self.between = nn.Dropout(0.5).eval(), between
        self.heads = nn.ModuleList([Gated(), Gated()])

    def forward(self, x: Tensor) -> list[Tensor]:
        read = self.between(self, x)
        return [head(*read) for head in self.heads]


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def distances(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    with SaliencyRegularizer(model, heads="heads", strength=1.0, **{"metric": "l1", **options}) as regularizer:
        for _ in range(2):
            model(x)
            regularizer()
        return regularizer.report.distances


def test_a_way_through_another_named_map_is_that_of_the_other() -> None:
    def between(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        feature = m.act(m.body(x))
        return feature, m.side(feature)

    model, x = Net(between), torch.randn(5, 3)
    with torch.no_grad():
        feature, gate = between(model, x)
    leaves = [feature.requires_grad_(), gate.requires_grad_()]
    rows = [torch.cat(torch.autograd.grad(head(*leaves).sum(), leaves), 1) for head in model.heads]
    expected = slow_distances([list(row) for row in rows], "l1", "mean")
    torch.testing.assert_close(distances(model, x, feature=["act", "side"]), expected)


def test_a_hook_on_what_heads_read_is_behind_the_named_map() -> None:
    def between(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        read = m.act(m.body(x)).view(-1, 4)
        read.register_hook(lambda gradient: 3 * gradient)
        return (read,)

    model, x = Net(between), torch.randn(5, 3)
    feature = model.act(model.body(x)).detach().requires_grad_()
    rows = [3 * torch.autograd.grad(head(feature).sum(), feature)[0] for head in model.heads]
    expected = slow_distances([list(row) for row in rows], "l1", "mean")
    torch.testing.assert_close(distances(model, x, feature="act"), expected)


@pytest.mark.parametrize("surgery", [None, lambda gramian: torch.ones(2)], ids=["plain", "surgery"])
def test_a_view_of_a_turned_memory_that_is_changed_in_place(surgery: Any) -> None:
    found = []
    for inplace in (False, True):

        def between(m: Any, x: Tensor, inplace: bool = inplace) -> tuple[Tensor, ...]:
            seen = m.turn(m.act(m.body(x).transpose(1, 2)))  # of a tensor [B, C, L] that lies as [B, L, C]
            seen = seen.mul_(3.0) if inplace else seen * 3.0
            return (seen.square().mean(1),)

        torch.manual_seed(0)
        model, x = Net(between), torch.randn(5, 6, 3)
        regularizer = SaliencyRegularizer(
            model, heads="heads", feature="turn", channel_axis=2, surgery=surgery, strength=0.1, metric="l1"
        )
        model(x)
        regularizer().backward()
        found.append((regularizer.report.distances, model.body.weight.grad))
    torch.testing.assert_close(*found)
    assert found[0][0][0, 1] > 0


def test_one_tensor_named_twice_counts_once_under_surgery() -> None:
    gradients = []
    for surgery in (None, lambda gramian: torch.ones(2)):
        torch.manual_seed(0)
        model, x = Net(lambda m, x: (m.act(m.drop(m.body(x))),)), torch.randn(5, 3)
        regularizer = SaliencyRegularizer(
            model, heads="heads", feature=["body", "drop"], strength=1.0, surgery=surgery, metric="l1"
        )
        model(x)
        regularizer().backward()
        gradients.append(model.body.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
