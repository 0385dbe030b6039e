"""Groups apart: tasks of one group share a network, which has nothing to do with that of another."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from ...runtime.errors import OptionError
from .blueprint import Blueprint
from .hard_sharing import HardSharing, hard_sharing


class GroupsApart(nn.Module):
    """Hard sharing within groups of tasks, and nothing between them, as TAG uses groups (Fifty et al., NeurIPS 2021).

    One group has all tasks until :meth:`part`. Each task is in one group, where TAG's may overlap.
    """

    #: Of the heads, while there is one group.
    heads_name = "networks.0.heads"

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self.tasks = blueprint.tasks
        self.networks = nn.ModuleList([hard_sharing(blueprint)])

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """``{task: [B] or [B, K]}``."""
        outputs: dict[str, Tensor] = {}
        for network in self.networks:
            outputs.update(network(inputs))
        return {task: outputs[task] for task in self.tasks}

    def part(self, groups: Sequence[Collection[str]]) -> None:
        """Give each group a network of its own, with a copy of the backbone and its heads as they are.

        Raises:
            OptionError: the tasks were parted before, or groups that do not have each of them once.
        """
        if len(self.networks) > 1 or sorted(task for group in groups for task in group) != sorted(self.tasks):
            raise OptionError(
                f"{len(self.networks)} network(s) of the tasks {list(self.tasks)} cannot be parted into "
                f"{[sorted(group) for group in groups]}. Pass groups that have each task once, and a new model."
            )
        whole = self._own()[0]
        heads = dict(zip(whole.tasks, whole.heads))
        parts = [[task for task in self.tasks if task in group] for group in groups]
        self.networks = nn.ModuleList(
            HardSharing(part, copy.deepcopy(whole.backbone), [heads[task] for task in part]) for part in parts
        )

    def parts(self) -> list[tuple[list[str], nn.Module]]:
        """Modules that share no parameter, each with its tasks: the best epoch of each is found on its own."""
        return [(list(network.tasks), network) for network in self._own()]

    @property
    def heads(self) -> nn.ModuleList:
        """Of each task, group by group."""
        return nn.ModuleList(head for network in self._own() for head in network.heads)

    def _own(self) -> list[HardSharing]:
        return [network for network in self.networks if isinstance(network, HardSharing)]
