"""A small model with an estimator for each task, and labels of three distinct kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

#: Three of each kind.
TASKS = ("a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2")
TRUE_GROUPS = (("a0", "a1", "a2"), ("b0", "b1", "b2"), ("c0", "c1", "c2"))
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


class Model(nn.Module):
    def __init__(self, tasks: Sequence[str] = TASKS, *, outputs: Callable[[str], int] = lambda task: 1) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(10, 8), nn.Tanh())
        self.heads = nn.ModuleDict(
            {task: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, outputs(task))) for task in tasks}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        feature = self.backbone(x)
        return {task: head(feature) for task, head in self.heads.items()}


def batch(step: int, size: int = 32) -> Tensor:
    return torch.randn(size, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def label(task: str, x: Tensor) -> Tensor:
    """``[B]``, by the first letter of the task."""
    return x[:, "abc".index(task[0])]


def losses(outputs: dict[str, Tensor], x: Tensor, absent: Sequence[str] = ()) -> dict[str, Tensor]:
    """Mean squared errors of all outputs against the label."""
    return {
        task: (output - label(task, x).unsqueeze(1)).square().mean()
        for task, output in outputs.items()
        if task not in absent
    }


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    absent: Callable[[int], Sequence[str]] = lambda step: (),
    part: slice = slice(None),
) -> None:
    for step in steps:
        x = batch(step)[part]
        optimizer.zero_grad()
        torch.stack(list(losses(model(x), x, absent(step)).values())).sum().backward()
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters are equal to the bit."""
    own, others = one.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)
