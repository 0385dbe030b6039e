"""A small convolutional network: shared by all tasks, or one of its own for every task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .objective import Objective, TaskLosses

__all__ = ["ACTIVATIONS", "BinaryTasks", "SeparateNetworks", "SharedNetwork", "TaskModel", "task_losses"]

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


class BinaryTasks(Objective):
    """Binary tasks of a :class:`TaskModel`, for batches of inputs and of labels ``[b, T]``.

    Args:
        tasks: their names.
        apart: keep the graphs of the tasks apart, for surgery on parameters; it takes more operations.
    """

    def __init__(self, tasks: Sequence[str], apart: bool) -> None:
        self.tasks = tuple(tasks)
        self._apart = apart

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> TaskLosses:
        inputs, labels = batch
        logits = list(model(inputs).values())
        if self._apart:
            return [
                functional.binary_cross_entropy_with_logits(own, truth, reduction="none")
                for own, truth in zip(logits, labels.unbind(1))
            ]
        return functional.binary_cross_entropy_with_logits(torch.stack(logits), labels.T, reduction="none")

    def predictions(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, labels = batch
        return {"logits": torch.stack(list(model(inputs).values()), dim=1), "labels": labels}

    def regularizer_arguments(self, batch: Any, losses: TaskLosses) -> dict[str, Any]:
        del batch
        stacked = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
        return {"losses": stacked.detach().mean(1).sum()} if stacked.shape[1] else {}


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
