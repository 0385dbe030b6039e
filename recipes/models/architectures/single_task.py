"""Single-task: a network for each task, which can be merged into one by task arithmetic when all are trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import OptionError
from .blueprint import Blueprint, equal_backbones
from .hard_sharing import HardSharing


class SingleTask(nn.Module):
    """A backbone and a head for each task: nothing is shared.

    All backbones begin with the same weights, those of hard sharing with the same seed. :func:`merged` needs that: weights
    of networks that began apart have nothing to do with each other, unit by unit. And no task is luckier than another.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        super().__init__()
        self.tasks = blueprint.tasks
        backbones = equal_backbones(blueprint)
        self.networks = nn.ModuleList(
            nn.Sequential(backbone, blueprint.head(task)) for backbone, task in zip(backbones, self.tasks)
        )

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """``{task: [B] or [B, K]}``."""
        return {task: network(inputs) for task, network in zip(self.tasks, self.networks)}

    def parts(self) -> list[tuple[list[str], nn.Module]]:
        """Modules that share no parameter, each with its tasks: the best epoch of each is found on its own."""
        return [([task], network) for task, network in zip(self.tasks, self.networks)]

    @property
    def heads(self) -> nn.ModuleList:
        """Of each task."""
        return nn.ModuleList(network.get_submodule("1") for network in self.networks)

    @property
    def backbones(self) -> list[nn.Module]:
        """Of each task."""
        return [network.get_submodule("0") for network in self.networks]


@torch.no_grad()
def merged(
    single_tasks: SingleTask, initial_backbone_state: Mapping[str, Tensor], scaling: float | None = None
) -> HardSharing:
    """One model out of trained single-task models, without training (task arithmetic, Ilharco et al., ICLR 2023).

    The backbone has the weights ``theta_0 + scaling * sum_t (theta_t - theta_0)``, and each task keeps its head. Buffers,
    such as the statistics of BatchNorm, are not weights: they are averaged over the tasks, and rounded where they are
    whole numbers.

    Args:
        single_tasks: the trained networks, which stay as they are.
        initial_backbone_state: ``theta_0``, the ``state_dict()`` of a backbone before the training, in memory of its own;
            building the model again with the same seed gives it, too.
        scaling: of the sum of task vectors, best chosen by validation; ``1 / T`` by default, the mean of the weights.

    Raises:
        OptionError: a state of another backbone, or a scaling that is not finite.
    """
    scaling = 1 / len(single_tasks.tasks) if scaling is None else scaling
    if not math.isfinite(scaling):
        raise OptionError(f"the scaling of task vectors must be finite; found {scaling}.")
    backbone = copy.deepcopy(single_tasks.backbones[0])
    states = [own.state_dict() for own in single_tasks.backbones]
    wrong = [
        name for name in {**states[0], **initial_backbone_state} if not _fits(name, states[0], initial_backbone_state)
    ]
    if wrong:
        raise OptionError(
            f"the initial state is not that of such a backbone: {sorted(wrong)[:4]} are missing on one side, or have "
            "another shape. Pass model.backbones[0].state_dict(), copied before the training."
        )
    weights = {name for name, _ in backbone.named_parameters(remove_duplicate=False)}
    result = {}
    for name, value in states[0].items():
        # Of halves, the differences would be lost; a mean of whole numbers is none.
        exact = torch.promote_types(value.dtype, torch.float32)
        own = torch.stack([state[name].to(exact) for state in states])
        if name in weights:
            first = initial_backbone_state[name].to(own)
            joined = first + scaling * (own - first).sum(0)
        else:
            joined = own.mean(0)
        result[name] = joined.to(value.dtype) if value.is_floating_point() else joined.round().to(value.dtype)
    backbone.load_state_dict(result)
    heads = [copy.deepcopy(network.get_submodule("1")) for network in single_tasks.networks]
    return HardSharing(single_tasks.tasks, backbone, heads)


def _fits(name: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return name in one and name in other and one[name].shape == other[name].shape
