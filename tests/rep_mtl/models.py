"""Small models, their losses per sample, and the saliencies of these taken one sample at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saliency_reg import RepMTL
from tests.reference.slow_rep_mtl import slow_cross_task, slow_task_specific
from tests.support.zoo import TASKS, MapHeads, Model, TokenHeads, VectorHeads, mlp


class PooledMap(nn.Module):
    """A head on a map that is not linear before it is pooled."""

    def __init__(self, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.first, self.activation, self.last = nn.Conv2d(4, 3, 1), activation(), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)).mean((2, 3)))


def make(kind: str) -> tuple[Model, Tensor]:
    """A model of vectors ``[B, 6]``, maps ``[B, 4, 3, 3]`` or tokens ``[B, 5, 4]``, and a batch of four."""
    torch.manual_seed(1)
    if kind == "vector":
        return VectorHeads(lambda: mlp(nn.Tanh())).double(), torch.randn(4, 5, dtype=torch.float64)
    if kind == "map":
        return MapHeads(PooledMap).double(), torch.randn(4, 2, 4, 4, dtype=torch.float64)
    return TokenHeads(1).double(), torch.randn(4, 5, 3, dtype=torch.float64)


def targets_of(size: int) -> Tensor:
    return torch.randn(size, len(TASKS), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def losses_of(outputs: dict[str, Tensor], targets: Tensor, known: Tensor | None = None) -> dict[str, Tensor]:
    """Squared errors ``[B]``, of very different sizes; 0 where a label is not known."""
    losses = {}
    for task, output in outputs.items():
        column = TASKS.index(task)
        loss = 10.0**column * (output.flatten(1).mean(1) - targets[:, column]).square()
        losses[task] = loss if known is None else loss * known[:, column]
    return losses


def slow_saliencies(
    model: Model, x: Tensor, targets: Tensor, known: Tensor, channel: int, *, log_losses: bool
) -> list[list[Tensor | None]]:
    """``[sample][task]``, ``[C, P]``: one sample and one task at a time, with a graph."""
    whole = losses_of(model(x), targets, known)
    found: list[list[Tensor | None]] = []
    for b in range(len(x)):
        row: list[Tensor | None] = []
        for column, task in enumerate(TASKS):
            feature = model.feature_map(x[b : b + 1])
            loss = losses_of(model.from_feature(feature), targets[b : b + 1])[task].sum()
            (gradient,) = torch.autograd.grad(loss, feature, create_graph=True)
            gradient = gradient[0].movedim(channel - 1, 0).reshape(feature.shape[channel], -1)
            if log_losses:
                gradient = gradient / whole[task].sum().detach()
            row.append(gradient if known[b, column] else None)
        found.append(row)
    return found


def slow_penalty(
    model: Model,
    x: Tensor,
    targets: Tensor,
    known: Tensor,
    channel: int,
    *,
    log_losses: bool,
    strengths: tuple[float, float] = (0.9, 0.9),
    temperature: float = 0.5,
) -> Tensor:
    saliencies = slow_saliencies(model, x, targets, known, channel, log_losses=log_losses)
    return strengths[0] * slow_task_specific(saliencies) + strengths[1] * slow_cross_task(saliencies, temperature)


def attached(model: nn.Module, **options: object) -> RepMTL:
    return RepMTL(model, heads="heads", **options)


def gradients(scalar: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(scalar, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters())]
