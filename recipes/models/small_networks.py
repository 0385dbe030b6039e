"""A small convolutional network: shared by all tasks, or one of its own for every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ACTIVATIONS", "SeparateNetworks", "SharedNetwork", "TaskModel", "task_losses"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
CHANNELS = 32


class TaskModel(nn.Module):
    """A model with one logit per task and sample."""

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def parts(self) -> list[tuple[list[str], nn.Module]]:
        """Modules that share no parameter, each with its tasks: the best epoch of each is found on its own."""
        raise NotImplementedError


class SharedNetwork(TaskModel):
    """One backbone and a head for every task (hard sharing)."""

    def __init__(self, tasks: Sequence[str], activation: str) -> None:
        super().__init__(tasks)
        self.backbone = _backbone()
        self.heads = nn.ModuleDict({task: _head(activation) for task in tasks})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.backbone(inputs)
        return {task: head(features).squeeze(1) for task, head in self.heads.items()}

    def parts(self) -> list[tuple[list[str], nn.Module]]:
        return [(list(self.tasks), self)]


class SeparateNetworks(TaskModel):
    """A whole network of the same shape for every task: nothing is shared."""

    def __init__(self, tasks: Sequence[str], activation: str) -> None:
        super().__init__(tasks)
        self.networks = nn.ModuleDict({task: nn.Sequential(_backbone(), _head(activation)) for task in tasks})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {task: network(inputs).squeeze(1) for task, network in self.networks.items()}

    def parts(self) -> list[tuple[list[str], nn.Module]]:
        return [([task], network) for task, network in self.networks.items()]


def task_losses(logits: Mapping[str, Tensor], labels: Tensor) -> list[Tensor]:
    """Mean cross-entropy of each task, for labels ``[N, T]``."""
    return [
        functional.binary_cross_entropy_with_logits(own, truth) for own, truth in zip(logits.values(), labels.unbind(1))
    ]


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


def _head(activation: str) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 4 * 4, 32), ACTIVATIONS[activation](), nn.Linear(32, 1))
