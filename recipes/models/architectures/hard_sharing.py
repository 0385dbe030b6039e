"""Hard sharing: one backbone for all tasks, and a head for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .blueprint import Blueprint


class HardSharing(nn.Module):
    """One backbone whose feature map all heads read (Caruana, Machine Learning 1997).

    What works at that feature map finds the heads by ``heads="heads", tasks=model.tasks``: without names of tasks, they
    are numbers.

    Args:
        tasks: T names.
        backbone: of all tasks.
        heads: T modules, in the order of the tasks.
    """

    def __init__(self, tasks: Sequence[str], backbone: nn.Module, heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.backbone = backbone
        # By place: names such as "type" or "a.b" cannot be those of modules.
        self.heads = nn.ModuleList(heads)

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """``{task: [B] or [B, K]}``."""
        feature = self.backbone(inputs)
        return {task: head(feature) for task, head in zip(self.tasks, self.heads)}


def hard_sharing(blueprint: Blueprint) -> HardSharing:
    """Build the plain model that all others are compared with."""
    return HardSharing(blueprint.tasks, blueprint.backbone(), [blueprint.head(task) for task in blueprint.tasks])
