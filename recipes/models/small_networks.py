"""Small networks that two cores can train: shared by all tasks, or one of its own for every task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .architectures.blueprint import Blueprint

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}
CHANNELS = 32


class SharedNetwork(nn.Module):
    """One convolutional backbone and a head for every task (hard sharing), with one logit for each."""

    def __init__(self, tasks: Sequence[str], activation: str) -> None:
        super().__init__()
        self.backbone = _backbone()
        self.heads = nn.ModuleDict({task: _head(activation) for task in tasks})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """``{task: [B]}``."""
        features = self.backbone(inputs)
        return {task: head(features).squeeze(1) for task, head in self.heads.items()}


class SeparateNetworks(nn.Module):
    """A whole network of the same shape for every task: nothing is shared."""

    def __init__(self, tasks: Sequence[str], activation: str) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({task: nn.Sequential(_backbone(), _head(activation)) for task in tasks})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """``{task: [B]}``."""
        return {task: network(inputs).squeeze(1) for task, network in self.networks.items()}

    def parts(self) -> list[tuple[list[str], nn.Module]]:
        """Modules that share no parameter, each with its tasks: the best epoch of each is found on its own."""
        return [([task], network) for task, network in self.networks.items()]


class SharedMLP(nn.Module):
    """Two hidden layers that all tasks share, and a head with one hidden layer and one output for each."""

    def __init__(self, inputs: int, tasks: Sequence[str], width: int, head_width: int, activation: str) -> None:
        super().__init__()
        layer = ACTIVATIONS[activation]
        self.backbone = nn.Sequential(nn.Linear(inputs, width), layer(), nn.Linear(width, width), layer())
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(width, head_width), layer(), nn.Linear(head_width, 1), nn.Flatten(0))
                for task in tasks
            }
        )

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """``{task: [B]}``."""
        feature = self.backbone(inputs)
        return {task: head(feature) for task, head in self.heads.items()}


def small_blueprint(tasks: Sequence[str], activation: str) -> Blueprint:
    """Parts of every architecture on the digits' images ``[B, 1, 8, 8]``: hard sharing of them is :class:`SharedNetwork`."""
    size = CHANNELS * 4 * 4
    return Blueprint(
        tasks=tuple(tasks),
        backbone=_backbone,
        head=lambda _: nn.Sequential(*_head(activation), nn.Flatten(0)),
        width=size,
        tower=lambda _, width: nn.Sequential(*_head(activation, width), nn.Flatten(0)),
        vector=nn.Flatten,
        example=torch.zeros(1, 1, 8, 8),
    )


def _backbone() -> nn.Module:
    # No BatchNorm: the saliency of a sample should not depend on the other samples of its batch.
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, CHANNELS, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        nn.ReLU(),
    )


def _head(activation: str, width: int = CHANNELS * 4 * 4) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 32), ACTIVATIONS[activation](), nn.Linear(32, 1))
