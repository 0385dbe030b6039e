"""Multi-layer perceptrons with a linear output for each task: shared, pooled, or one of its own for every task."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .small_networks import ACTIVATIONS


class LinearHeads(nn.Module):
    """Hidden layers that all tasks share, and one linear head with an output for each."""

    def __init__(self, inputs: int, tasks: Sequence[str], widths: Sequence[int], activation: str) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.backbone = _hidden(inputs, widths, activation)
        self.heads = nn.Linear(widths[-1], len(self.tasks))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """``{task: [B]}``."""
        return dict(zip(self.tasks, self.heads(self.backbone(inputs)).unbind(1)))


class PooledHead(nn.Module):
    """The same with one head for all tasks, but for an intercept of each: tasks differ in how often they are true alone."""

    def __init__(self, inputs: int, tasks: Sequence[str], widths: Sequence[int], activation: str) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.backbone = _hidden(inputs, widths, activation)
        self.heads = nn.Linear(widths[-1], 1, bias=False)
        self.intercepts = nn.Parameter(torch.zeros(len(self.tasks)))

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """``{task: [B]}``."""
        output = self.heads(self.backbone(inputs)).squeeze(1)
        return {task: output + own for task, own in zip(self.tasks, self.intercepts)}


class SeparateLinearHeads(nn.Module):
    """A whole network of the same shape for every task: nothing is shared."""

    def __init__(self, inputs: int, tasks: Sequence[str], widths: Sequence[int], activation: str) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        # By place: names such as "type" or "a.b" cannot be those of modules.
        self.networks = nn.ModuleList(
            nn.Sequential(_hidden(inputs, widths, activation), nn.Linear(widths[-1], 1)) for _ in self.tasks
        )

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """``{task: [B]}``."""
        return {task: network(inputs).squeeze(1) for task, network in zip(self.tasks, self.networks)}

    def parts(self) -> list[tuple[list[str], nn.Module]]:
        """Modules that share no parameter, each with its tasks: the best epoch of each is found on its own."""
        return [([task], network) for task, network in zip(self.tasks, self.networks)]


def _hidden(inputs: int, widths: Sequence[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((inputs, *widths)):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)
