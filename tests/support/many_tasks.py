"""Relation weights of many tasks, and a training that samples them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer

TASKS, SAMPLE = 100, 14

RULES = {
    "entropic": {"mass": 2.0, "temperature": 0.4},
    "entropic, cold": {"temperature": 0.03, "momentum": 0.5},
    "entropic, hot": {"temperature": 3.0, "momentum": 0.0},
    "entropic, its own scale": {"scale": 0.7},
    "entropic, out of range": {"scale": 1e-3},
    "entropic, colder than one centre allows": {"temperature": 1e-3},
    "per_task": {"mass": 2.0},
    "projected": {"learning_rate": 0.3},
    "authors": {"learning_rate": 0.05},
    "fixed": {"mass": 3.0},
}


def relations_of(case: str, tasks: int = TASKS) -> RelationWeights:
    return RelationWeights(tasks, case.split(",")[0], **RULES[case])


class Run:
    """A model of ``tasks`` columns, and its regularizer with a sample of them."""

    def __init__(self, tasks: int, case: str = "entropic", sample: int | None = 10, **options: object) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, tasks)).double()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        arguments = {
            "heads": "2",
            "strength": 0.5,
            "max_tasks_per_step": sample,
            "relations": relations_of(case, tasks),
        }
        self.regularizer = SaliencyRegularizer(
            self.net,
            **{
                "strength": 0.1,
                **arguments,
                "optimizer": self.optimizer,
                "metric": "sqeuclidean",
                **options,
            },
        )

    def call(self, number: int, rows: slice = slice(None)) -> Tensor:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64)[rows]
        loss = self.net(x).square().mean()
        penalty = self.regularizer(losses=loss)
        (penalty + loss).backward()
        return penalty.detach()

    def steps(self, numbers: range, calls: int = 1) -> list[Tensor]:
        found = []
        for number in numbers:
            self.optimizer.zero_grad()
            found += [self.call(10 * number + call) for call in range(calls)]
            self.optimizer.step()
        return found
