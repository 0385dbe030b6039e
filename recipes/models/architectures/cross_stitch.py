"""Cross-stitch: a network for each task, whose activations are mixed after each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import OptionError
from .blueprint import Blueprint, equal_backbones

#: Where torch keeps the layers after which a stage can end.
_ENDS = ("torch.nn.modules.activation", "torch.nn.modules.pooling")


class CrossStitch(nn.Module):
    """Cross-stitch networks (Misra et al., CVPR 2016, equation 1): ``x~_i = sum_j alpha_ij x_j`` after each stage.

    Each unit is one matrix ``alpha [T, T]`` for all channels and positions, without softmax or constraint. The unit behind
    the last stage feeds the heads. Memory and time are T times those of hard sharing: it is for few tasks.

    All backbones begin with the same weights, so that a channel means the same in each, and rows of sum 1 keep activations
    at their size. (The paper starts from networks that were trained on each task, from common weights.) Public code often
    begins with alphas of 1, by which activations grow T-fold in every stage, or has no unit behind the last stage.

    Args:
        blueprint: of backbone and heads.
        own: ``alpha_ii`` at first, from 0 to 1; the others of a row share ``1 - own``.

    Raises:
        OptionError: ``own`` is not from 0 to 1.
    """

    #: Of the units, as a multiple of the learning rate of all other parameters. The paper's 100 to 1000 are for SGD; Adam
    #: does not know how small gradients are, so that it needs little: our choice.
    mixing_rate = 10.0

    def __init__(self, blueprint: Blueprint, own: float = 0.9) -> None:
        super().__init__()
        if not (math.isfinite(own) and 0 <= own <= 1):
            raise OptionError(f"own must be a share from 0 to 1; found {own}.")
        self.tasks = blueprint.tasks
        count = len(self.tasks)
        stages = [stages_of(backbone) for backbone in equal_backbones(blueprint)]
        # By stage and then by task; a Sequential is taken apart, so that each of its layers has one place here.
        self.stages = nn.ModuleList(nn.ModuleList(of_tasks) for of_tasks in zip(*stages))
        start = torch.full((count, count), (1 - own) / max(count - 1, 1)).fill_diagonal_(own if count > 1 else 1.0)
        self.units = nn.ParameterList(nn.Parameter(start.clone()) for _ in self.stages)
        self.heads = nn.ModuleList(blueprint.head(task) for task in self.tasks)

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """``{task: [B] or [B, K]}``."""
        states: Any = [inputs] * len(self.tasks)
        stages: Sequence[Any] = list(self.stages)
        for stage, unit in zip(stages, self.units):
            outputs = torch.stack([part(state) for part, state in zip(stage, states)])
            states = torch.einsum("ij,j...->i...", unit, outputs)
        return {task: head(state) for task, head, state in zip(self.tasks, self.heads, states)}

    def mixing_parameters(self) -> list[nn.Parameter]:
        """The units, whose sharing weight decay would pull to 0."""
        return list(self.units)


def stages_of(backbone: nn.Module) -> list[nn.Module]:
    """Cut a backbone into the stages that units go between; one that is no ``nn.Sequential`` is one stage.

    A stage begins with the first layer with parameters behind an activation, a pooling, or a block (a module of several,
    such as a residual one). ``Sequential`` modules in it are taken apart, too.
    """
    if not _is_plain(backbone):
        return [backbone]
    stages: list[list[nn.Module]] = [[]]
    complete = False
    for layer in _layers(backbone):
        if complete and next(layer.parameters(), None) is not None:
            stages.append([])
            complete = False
        stages[-1].append(layer)
        complete = complete or _ends(layer)
    return [nn.Sequential(*stage) for stage in stages]


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _layers(module: nn.Module) -> list[nn.Module]:
    if not (isinstance(module, nn.Sequential) and _is_plain(module)):
        return [module]
    # Not children(), which has a layer once that is there twice, such as one ReLU for all.
    return [layer for child in module for layer in _layers(child)]


def _ends(layer: nn.Module) -> bool:
    if any(base.__module__ in _ENDS for base in type(layer).__mro__):
        return True
    return next(layer.children(), None) is not None
