"""A model of a backbone and heads, and what its regularizer gives and tells."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from tests.reference.slow import slow_distances, slow_saliency


def mlp(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 5), nn.GELU(), nn.Linear(5, outputs))


class Net(nn.Module):
    """A backbone and heads that read what ``between`` makes of its output."""

    def __init__(
        self, backbone: nn.Module, heads: dict[str, nn.Module], between: Callable[[Tensor], Tensor] | None = None
    ):
        super().__init__()
        self.backbone, self.heads, self.between = backbone, nn.ModuleDict(heads), between

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.feature = self.backbone(x)
        read = self.feature if self.between is None else self.between(self.feature)
        return {task: head(read) for task, head in self.heads.items()}


def plain(heads: dict[str, nn.Module]) -> Net:
    return Net(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), heads)


def called(net: nn.Module, x: Tensor, *, mask: Tensor | None = None, **options: Any) -> SaliencyRegularizer:
    regularizer = SaliencyRegularizer(net, heads="heads", strength=1.0, **{"metric": "l1", **options})
    net(x)
    regularizer(mask=mask)
    regularizer.remove()
    return regularizer


def told(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught]


def by_sample(
    net: Net,
    x: Tensor,
    scalar: Callable[[Tensor], Tensor],
    pooled: Callable[[Tensor], Tensor],
    metric: str = "l1",
) -> Tensor:
    """Distances by loops, each sample alone."""
    saliencies: list[list[Tensor]] = [[] for _ in net.heads]
    for one in x.split(1):
        outputs = net(one)
        for row, output in zip(saliencies, outputs.values()):
            row.append(pooled(slow_saliency(output, net.feature, scalar)))
    return slow_distances(saliencies, metric, "mean")


class Behind(nn.Module):
    def __init__(self, inner: nn.Module, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.last = inner, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


def tokens(z: Tensor) -> Tensor:
    return z.flatten(2).mT


def last(z: Tensor) -> Tensor:
    return z.permute(0, 2, 3, 1)
