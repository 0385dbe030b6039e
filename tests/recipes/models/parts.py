"""A small blueprint, with names of tasks that no module can have, and several outputs."""

import torch
from torch import nn

from recipes.models.architectures.blueprint import Blueprint

#: Outputs of each task.
OUTPUTS = {"type": 1, "a.b": 3, "forward": 1}
#: Features of the vector.
WIDTH = 6


def _head(inputs, outputs):
    layers = [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers, *([nn.Flatten(0)] if outputs == 1 else []))


def backbone():
    """Two stages, from ``[B, 2, 4, 4]`` to ``[B, 6, 2, 2]``."""
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(3, WIDTH, 1), nn.Tanh())


def pooling():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def blueprint(tasks=OUTPUTS, backbone=backbone):
    return Blueprint(
        tuple(tasks),
        backbone,
        lambda task: nn.Sequential(nn.Flatten(), _head(WIDTH * 4, OUTPUTS.get(task, 1))),
        WIDTH,
        lambda task, width: _head(width, OUTPUTS.get(task, 1)),
        pooling,
        torch.zeros(1, 2, 4, 4),
    )


def inputs_of(count):
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def scramble(model, seed=0):
    """In double precision, with gates and units away from where they begin."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model
