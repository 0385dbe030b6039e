"""MMoE on features: experts that all tasks share, and a gate for each task that mixes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .blueprint import Blueprint
from .experts import Expert, Gate, mixed, whole, width_of_experts


class MMoE(nn.Module):
    """Multi-gate mixture of experts (Ma et al., KDD 2018, section 4.2) behind one shared backbone.

    With the vector x of the shared feature map: ``z_t = sum_i g_ti e_i(x)``, ``g_t = softmax(W_t x)``, ``y_t =
    tower_t(z_t)``. Paper and public code often have the raw input, or whole networks as experts, where we have x: that
    would multiply the cost of an image or text model by n, and a gate cannot read pixels.

    Args:
        blueprint: of backbone and heads.
        experts: their number n, 8 in the paper.
        expert_width: units of each; by default together as wide as the feature.

    Raises:
        OptionError: numbers below 1.
    """

    #: Of the gates, as a multiple of the learning rate of all other parameters.
    mixing_rate = 1.0

    def __init__(self, blueprint: Blueprint, experts: int = 8, expert_width: int | None = None) -> None:
        super().__init__()
        width = blueprint.width
        outputs = width_of_experts(expert_width, width, whole("experts", experts, least=1))
        self.tasks = blueprint.tasks
        self.backbone = blueprint.backbone()
        self.vector = blueprint.vector()
        self.experts = nn.ModuleList(Expert(width, outputs) for _ in range(experts))
        self.task_gates = nn.ModuleList(Gate(width, experts) for _ in self.tasks)
        self.towers = nn.ModuleList(blueprint.tower(task, outputs) for task in self.tasks)

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """``{task: [B] or [B, K]}``."""
        vector = self.vector(self.backbone(inputs))
        experts = torch.stack([expert(vector) for expert in self.experts], dim=1)
        return {
            task: tower(mixed(experts, gate(vector)))
            for task, gate, tower in zip(self.tasks, self.task_gates, self.towers)
        }

    @torch.no_grad()
    def gates(self, inputs: Any) -> Tensor:
        """``[B, T, n]``: for each sample and task the weights of the experts, for ``mean_gates`` and ``gate_entropy``.

        In eval mode; or else the statistics of BatchNorm move.
        """
        vector = self.vector(self.backbone(inputs))
        return torch.stack([gate(vector) for gate in self.task_gates], dim=1)

    def mixing_parameters(self) -> list[nn.Parameter]:
        """The gates, which weight decay would pull towards equal experts."""
        return list(self.task_gates.parameters())
