"""PLE on features: layers of experts, some of each task's own, some shared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.errors import OptionError
from .blueprint import Blueprint
from .experts import Expert, Gate, mixed, whole, width_of_experts


class ExtractionLayer(nn.Module):
    """One layer of PLE: a customized gate control (CGC), with a gate for the shared state unless it is the last.

    Args:
        tasks: T.
        width, outputs: of each state before and after.
        own, shared: numbers of experts, of each task and of all.
        last: nobody reads the shared state behind this layer.
    """

    def __init__(self, tasks: int, width: int, outputs: int, own: int, shared: int, last: bool) -> None:
        super().__init__()
        self.own = nn.ModuleList(nn.ModuleList(Expert(width, outputs) for _ in range(own)) for _ in range(tasks))
        self.shared = nn.ModuleList(Expert(width, outputs) for _ in range(shared))
        self.task_gates = nn.ModuleList(Gate(width, own + shared) for _ in range(tasks))
        # Without shared experts nobody reads a shared state. A gate that nobody reads would stop DDP.
        self.shared_gate = None if last or not shared else Gate(width, tasks * own + shared)

    def forward(self, states: Sequence[Tensor], shared_state: Tensor) -> tuple[list[Tensor], Tensor]:
        """The states of the tasks, T times ``[B, width]``, and the shared one: ``[B, outputs]`` each.

        Without a gate of its own the shared state is returned as it came.
        """
        shared = [expert(shared_state) for expert in self.shared]
        of_tasks: Sequence[Any] = list(self.own)
        own = [[expert(state) for expert in experts] for experts, state in zip(of_tasks, states)]
        after = [
            mixed(torch.stack([*experts, *shared], dim=1), gate(state))
            for experts, gate, state in zip(own, self.task_gates, states)
        ]
        if self.shared_gate is None:
            return after, shared_state
        everyone = torch.stack([*(output for experts in own for output in experts), *shared], dim=1)
        return after, mixed(everyone, self.shared_gate(shared_state))


class PLE(nn.Module):
    """Progressive layered extraction (Tang et al., RecSys 2020, section 4.2) behind one shared backbone.

    All states begin as the vector of the shared feature map. In each layer the experts and the gate of a task read the
    state of that task, shared experts and the shared gate the shared state; the gate of a task mixes its own and the shared
    experts, the shared gate all experts there are. With one layer it is CGC. Public code often leaves the shared state
    out, and has a gate in the last layer that nobody reads.

    Args:
        blueprint: of backbone and heads.
        layers: J, 2 in the paper.
        own, shared: numbers of experts of each layer, of each task and of all.
        expert_width: units of each; by default those of a layer are together as wide as the feature.

    Raises:
        OptionError: no layer, or no expert.
    """

    #: Of the gates, as a multiple of the learning rate of all other parameters.
    mixing_rate = 1.0

    def __init__(
        self, blueprint: Blueprint, layers: int = 2, own: int = 1, shared: int = 1, expert_width: int | None = None
    ) -> None:
        super().__init__()
        whole("layers", layers, least=1)
        if whole("own", own, least=0) + whole("shared", shared, least=0) == 0:
            raise OptionError("PLE needs experts: own or shared must be 1 or more; found 0 of both.")
        tasks = len(blueprint.tasks)
        outputs = width_of_experts(expert_width, blueprint.width, tasks * own + shared)
        self.tasks = blueprint.tasks
        self.backbone = blueprint.backbone()
        self.vector = blueprint.vector()
        self.layers = nn.ModuleList(
            ExtractionLayer(tasks, outputs if layer else blueprint.width, outputs, own, shared, layer == layers - 1)
            for layer in range(layers)
        )
        self.towers = nn.ModuleList(blueprint.tower(task, outputs) for task in self.tasks)

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        """``{task: [B] or [B, K]}``."""
        shared = self.vector(self.backbone(inputs))
        states = [shared for _ in self.tasks]
        for layer in self.layers:
            states, shared = layer(states, shared)
        return {task: tower(state) for task, tower, state in zip(self.tasks, self.towers, states)}

    def mixing_parameters(self) -> list[nn.Parameter]:
        """The gates, which weight decay would pull towards equal experts."""
        return [own for module in self.modules() if isinstance(module, Gate) for own in module.parameters()]
