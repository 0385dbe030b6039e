"""Tasks, and the penalty of heads by explicit autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.slow import slow_distances, slow_penalty

TASKS = ("a", "b", "c")


def expected_penalty(feature: Tensor, outputs: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
    """The penalty by explicit autograd, sample by sample; ``outputs`` are those of all tasks, ``[1, K]`` each."""
    saliencies: list[list[Tensor]] = [[] for _ in outputs(feature[:1])]
    for sample in feature.split(1):
        own = sample.detach().requires_grad_()
        for task, output in enumerate(outputs(own)):
            logits = output.flatten()
            scalar = logits.amax() - logits.mean()
            if len(logits) <= 2:
                scalar = logits[1] - logits[0] if len(logits) == 2 else logits.sum()
            saliencies[task].append(torch.autograd.grad(scalar, own, retain_graph=True)[0][0])
    count = len(saliencies)
    weights = torch.full((count, count), 2 / (count * (count - 1)), dtype=torch.float64)
    return slow_penalty(slow_distances(saliencies, "l1", "mean"), weights)


def chain(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for index in range(1, len(widths)):
        layers += [nn.Linear(widths[index - 1], widths[index]), nn.Tanh()]
    return nn.Sequential(*layers)


class Towers(nn.Module):
    """Branches in two containers."""

    def __init__(self, outputs: int = 1, kind: Any = nn.ModuleList, hidden: int = 6) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        members = [chain(5, hidden) for _ in TASKS], [nn.Linear(hidden, outputs) for _ in TASKS]
        if kind is nn.ModuleDict:
            self.towers, self.last = (kind(dict(zip(TASKS, own))) for own in members)
        else:
            self.towers, self.last = (kind(own) for own in members)

    def of(self, shared: Tensor) -> list[Tensor]:
        pairs = (each.values() if isinstance(each, nn.ModuleDict) else each for each in (self.towers, self.last))
        return [last(torch.relu(tower(shared))) for tower, last in zip(*pairs)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.of(self.bottom(x))


class Named(nn.Module):
    """Branches as attributes, of three modules each."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        for task in TASKS:
            setattr(self, f"tower_{task}", chain(5, 6))
            setattr(self, f"middle_{task}", chain(6, 3))
            setattr(self, f"out_{task}", nn.Linear(3, 2))

    def of(self, shared: Tensor) -> list[Tensor]:
        found = []
        for task in TASKS:
            hidden = getattr(self, f"middle_{task}")(getattr(self, f"tower_{task}")(shared))
            found.append(getattr(self, f"out_{task}")(hidden))
        return found

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.of(self.bottom(x))
