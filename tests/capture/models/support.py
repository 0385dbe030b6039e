"""Models as people write them, and their penalty without hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer, task_distances, task_saliencies
from tests.support.attachment import uniform

TASKS = ["age", "gender", "smile"]


def sum_of_distances(outputs: Any, feature: Tensor, **options: Any) -> Tensor:
    """The penalty with strength 1 and weights 1, without hooks."""
    return task_distances(task_saliencies(outputs, feature, **options)).triu(1).sum()


def attached(model: nn.Module, *args: Any, tasks: int = 3, **options: Any) -> SaliencyRegularizer:
    return SaliencyRegularizer(model, *args, strength=1.0, relations=uniform(tasks), **{"metric": "l1", **options})


def mlp(inputs: int, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.GELU(), nn.Linear(8, outputs))


class SoftSharing(nn.Module):
    """A whole network per task on the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleDict({task: mlp(5) for task in TASKS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {task: tower(x) for task, tower in self.towers.items()}
