"""A model of two heads, and its penalty by explicit autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import PCGrad, SaliencyRegularizer
from tests.reference.slow import slow_distances, slow_penalty

SURGERY = pytest.mark.parametrize("surgery", [False, True], ids=["plain", "surgery"])


def mlp(first: nn.Module | None = None, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(*(() if first is None else (first,)), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, outputs))


class Net(nn.Module):
    """Two heads; what comes before them is a function of the model, which notes in ``meant`` the tensor that is named."""

    def __init__(
        self, between: Callable[[Any, Tensor], Any], heads: Sequence[nn.Module] = (), inplace: bool = False
    ) -> None:
        super().__init__()
        self.body, self.side, self.gate = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 4)
        self.act, self.inner = nn.ReLU(inplace), nn.Softplus()
        self.heads = nn.ModuleList(heads or [mlp(), mlp()])
        self.between, self.inplace, self.meant = between, inplace, torch.empty(0)

    def forward(self, x: Tensor) -> Any:
        return self.between(self, x)

    def all(self, *args: Tensor) -> list[Tensor]:
        return [head(*args) for head in self.heads]

    def times(self, tensor: Tensor, factor: float) -> Tensor:
        return tensor.mul_(factor) if self.inplace else tensor * factor


def by_hand(outputs: Sequence[Tensor], feature: Tensor) -> float:
    """The penalty of strength 1 with uniform weights, by one gradient per task, summed over positions."""
    gradients = [torch.autograd.grad(out.sum(), feature, create_graph=True)[0] for out in outputs]
    rows = [one.flatten(1, -2).sum(1) if one.ndim > 2 else one for one in gradients]
    size = len(rows)
    weights = (torch.ones(size, size) - torch.eye(size)) / (size * (size - 1) / 2)
    return slow_penalty(slow_distances([list(row) for row in rows], "l1", "mean"), weights).item()


def found(model: nn.Module, x: Any, steps: int = 3, surgery: bool = False, **options: Any) -> list[float]:
    """The penalty in several forwards, the first of which looks at more; each with a backward pass."""
    if surgery:
        options["surgery"] = PCGrad()
    penalties = []
    with SaliencyRegularizer(model, heads="heads", strength=1.0, **{"metric": "l1", **options}) as regularizer:
        for _ in range(steps):
            outputs = model(x)
            penalties.append(regularizer())
            (sum(output.square().mean() for output in outputs) + penalties[-1]).backward()
    return [penalty.item() for penalty in penalties]


def rows(m: Any, x: Tensor) -> Any:
    m.meant = feature = m.body(x)
    return m.all(feature)
