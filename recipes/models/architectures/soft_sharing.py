"""Soft sharing: a network for each task, whose weights are held together by a penalty."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import OptionError
from .blueprint import Blueprint, equal_backbones


class SoftSharing(nn.Module):
    """A backbone for each task, and a penalty on the distances between their weights (Duong et al., ACL 2015).

    All backbones begin with the same weights: distances between networks that began apart say nothing about what they
    compute. With a strength of 0 it is the single-task model, with a large one hard sharing.

    Args:
        blueprint: of backbone and heads.
        strength: of the penalty, 0 or more; an attribute that can be set.

    Raises:
        OptionError: a strength below 0, or a backbone without a matrix.
    """

    def __init__(self, blueprint: Blueprint, strength: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(strength) and strength >= 0):
            raise OptionError(f"the strength of soft sharing must be a finite number from 0 on; found {strength}.")
        self.tasks = blueprint.tasks
        self.strength = strength
        self.backbones = nn.ModuleList(equal_backbones(blueprint))
        self.heads = nn.ModuleList(blueprint.head(task) for task in self.tasks)
        if not any(map(_is_matrix, self.backbones[0].parameters())):
            raise OptionError(
                f"soft sharing holds matrices of the backbones together, but {type(self.backbones[0]).__name__} has none. "
                "Choose another backbone or architecture."
            )

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """``{task: [B] or [B, K]}``."""
        return {task: head(own(inputs)) for task, own, head in zip(self.tasks, self.backbones, self.heads)}

    def penalty(self) -> Tensor:
        """``strength * sum_l sum_{i<j} |W_li - W_lj|^2 = strength * T * sum_l sum_i |W_li - mean_l|^2``, 0-dim.

        Over all parameters W_l of the backbones with two axes or more, kernels too; biases, BatchNorm and heads are free.
        """
        total: Any = 0.0  # a tensor at once: there is a matrix
        for of_tasks in zip(*(backbone.parameters() for backbone in self.backbones)):
            if _is_matrix(of_tasks[0]):
                # From one of them, which changes no distance: then those of equal weights are exactly 0.
                weights = torch.stack(of_tasks) - of_tasks[0].detach()
                total = total + (weights - weights.mean(0)).square().sum()
        penalty: Tensor = self.strength * len(self.tasks) * total
        return penalty


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim >= 2
