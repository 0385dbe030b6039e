"""All architectures by name, and what optimizers and tables ask of any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...runtime.errors import OptionError
from .blueprint import Blueprint
from .branching import Branching
from .cross_stitch import CrossStitch
from .groups_apart import GroupsApart
from .hard_sharing import hard_sharing
from .mmoe import MMoE
from .ple import PLE
from .single_task import SingleTask
from .soft_sharing import SoftSharing

ARCHITECTURES: Mapping[str, Callable[[Blueprint], nn.Module]] = {
    "hard_sharing": hard_sharing,
    "single_task": SingleTask,
    "merged": SingleTask,  # until they are trained
    "mmoe": MMoE,
    "ple": PLE,
    "cross_stitch": CrossStitch,
    "soft_sharing": SoftSharing,
    "branching": Branching,
    "groups_apart": GroupsApart,
}


def build(architecture: str, blueprint: Blueprint) -> nn.Module:
    """Build a model of an architecture, with new weights, whose ``forward(inputs)`` returns ``{task: [B] or [B, K]}``.

    Raises:
        OptionError: there is no such architecture.

    >>> import torch
    >>> from recipes.models.small_networks import small_blueprint
    >>> model = build("mmoe", small_blueprint(["a", "b.c"], "gelu"))
    >>> {task: tuple(output.shape) for task, output in model(torch.zeros(5, 1, 8, 8)).items()}
    {'a': (5,), 'b.c': (5,)}
    """
    if architecture not in ARCHITECTURES:
        raise OptionError(f"there is no architecture {architecture!r}. Use one of {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[architecture](blueprint)


def parameters_of(model: nn.Module) -> int:
    """How many numbers are trained; those that are used twice count once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: gates and cross-stitch units without weight decay, at a learning rate of their own.

    One group with all parameters for a model that has none of these.
    """
    mixing: list[nn.Parameter] = getattr(model, "mixing_parameters", list)()
    known = set(map(id, mixing))
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups: list[dict[str, Any]] = [{"params": others, "lr": learning_rate, "weight_decay": weight_decay}]
    if mixing:
        rate = learning_rate * float(getattr(model, "mixing_rate", 1.0))
        groups.append({"params": mixing, "lr": rate, "weight_decay": 0.0})
    return groups
