"""A model that runs the heads that it is told, each process's share of the data, and the errors that it met."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from saliency_reg import SaliencyRegError, SaliencyRegularizer
from tests.reference.slow_ranks import Share
from tests.support.zoo import TASKS, mlp

STRENGTH, RATE = 0.7, 0.1


HAS_FSDP2 = hasattr(torch.distributed.fsdp, "fully_shard")


class Selective(nn.Module):
    """Runs only the heads that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: mlp(nn.Tanh()) for task in TASKS})
        self.checkpointed = False

    def feature_map(self, x: Tensor) -> Tensor:
        return checkpoint(self.backbone, x, use_reentrant=False) if self.checkpointed else self.backbone(x)

    def from_feature(self, feature: Tensor, ran: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        return {task: self.heads[task](feature) for task in ran}

    def forward(self, x: Tensor, ran: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        return self.from_feature(self.feature_map(x), ran)


def build_model() -> Selective:
    torch.manual_seed(3)
    return Selective().double()


def losses_of(outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    return {
        task: (1 + TASKS.index(task)) * (output.squeeze(1) - targets[:, TASKS.index(task)]).square().mean()
        for task, output in outputs.items()
    }


def quiet() -> None:
    # A hint on speed: a second derivative leaves a [1, C] gradient with other strides than its parameter has.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


def share(rank: int, size: int = 4, ran: tuple[str, ...] = TASKS) -> Share:
    generator = torch.Generator().manual_seed(7 + rank)
    inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return Share(inputs, torch.randn(size, len(TASKS), generator=generator, dtype=torch.float64), ran)


def error_of(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except SaliencyRegError as error:
        return type(error).__name__, str(error)
    return "no error", ""


def one_call(model: nn.Module, regularizer: SaliencyRegularizer, mine: Share) -> Tensor:
    losses = losses_of(model(mine.inputs, mine.ran), mine.targets)
    return sum(losses.values()) + regularizer()
