"""A training that depends on everything that could be disturbed: dropout, BatchNorm, momentum, a scheduler of steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer

TASKS = ("left", "right", "up")


class ResidualHead(nn.Module):
    """Reads the feature twice, so that gradients add up in an order that an alias would change."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3))
        self.out = nn.Linear(8, 1)

    def forward(self, feature: Tensor) -> Tensor:
        return self.out(feature + self.hidden(feature))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8))
        self.heads = nn.ModuleDict({task: ResidualHead() for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.backbone(x)
        return {task: head(feature) for task, head in self.heads.items()}


def make_model(seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-3)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 1, generator=generator)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    regularizer: SaliencyRegularizer | None = None,
    after: Callable[[int], None] = lambda step: None,
) -> list[Tensor]:
    losses = []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        outputs = model(x)
        loss = sum(((output - y) ** 2).mean() for output in outputs.values())
        if regularizer is not None:
            loss = loss + regularizer()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        after(step)
    return losses


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
