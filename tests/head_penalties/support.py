"""Small models whose head weights are penalised, and the objective that their training should minimise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import HeadPenalty

TASKS = ("a", "b", "c")


class Heads(nn.Module):
    """Heads on the inputs themselves."""

    def __init__(self, make: Callable[[str], nn.Module], tasks: Sequence[str] = TASKS) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({task: make(task) for task in tasks})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {task: head(x) for task, head in self.heads.items()}


def linear_heads(inputs: int = 4, outputs: int = 1, tasks: Sequence[str] = TASKS) -> Heads:
    return Heads(lambda task: nn.Linear(inputs, outputs), tasks)


def deep_heads(tasks: Sequence[str] = TASKS, last: Callable[[str], int] = lambda task: 1) -> Heads:
    def make(task: str) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm([6]), nn.Tanh(), nn.Linear(6, 5), nn.Linear(5, last(task)))

    return Heads(make, tasks)


def first_weights(model: Heads) -> Tensor:
    """``[T, M]`` of ``Linear`` heads, a copy."""
    return torch.stack([head.weight.detach().flatten() for head in model.heads.values()])


def make(model: nn.Module, kind: str, strength: float = 0.1, lr: float = 0.1, **options: Any) -> Any:
    """A penalty on ``model.heads``, and the SGD that it follows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return HeadPenalty(model, "heads", kind=kind, strength=strength, optimizer=optimizer, **options), optimizer


def steps_on(
    model: nn.Module, optimizer: Any, penalty: HeadPenalty | None, steps: range, tasks: Sequence[str] = TASKS
) -> list[Tensor]:
    """Mean squares of the outputs to a target, of some of the tasks."""
    found = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(12, width, generator=generator) for width in (4, 1))
        optimizer.zero_grad()
        outputs = model(x.to(next(model.parameters()).dtype))
        loss = sum((outputs[task] - y).square().mean() for task in tasks)
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found
