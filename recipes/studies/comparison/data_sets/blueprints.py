"""Blueprints whose heads are small perceptrons on one vector of each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ....data.task_kinds import TaskKind
from ....models.architectures.blueprint import Blueprint
from ....models.small_networks import ACTIVATIONS


def blueprint_of(
    kinds: Mapping[str, TaskKind],
    backbone: Callable[[], nn.Module],
    width: int,
    hidden: int,
    activation: str,
    vector: Callable[[], nn.Module] = nn.Identity,
) -> Blueprint:
    """A backbone, and for each task a head with one hidden layer, or none.

    Args:
        kinds: of the tasks.
        backbone: makes a backbone.
        width: of what ``vector`` gives.
        hidden: units of the hidden layer in each head; 0 for linear heads.
        activation: behind it.
        vector: makes what is between the feature map and vectors ``[B, width]``; by default they are the same.
    """

    def tower(task: str, inputs: int) -> nn.Module:
        return nn.Sequential(*_layers(kinds[task], inputs, hidden, activation))

    def head(task: str) -> nn.Module:
        before = vector()
        return nn.Sequential(
            *([] if isinstance(before, nn.Identity) else [before]), *_layers(kinds[task], width, hidden, activation)
        )

    return Blueprint(tuple(kinds), backbone, head, width, tower, vector)


def perceptron(widths: tuple[int, ...], activation: str) -> Callable[[], nn.Module]:
    """What makes a backbone of these layers ``(inputs, ..., outputs)``, each with an activation."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
        return nn.Sequential(*layers)

    return make


def _layers(kind: TaskKind, inputs: int, hidden: int, activation: str) -> list[nn.Module]:
    layers: list[nn.Module] = []
    if hidden:
        layers += [nn.Linear(inputs, hidden), ACTIVATIONS[activation]()]
    layers.append(nn.Linear(hidden or inputs, kind.classes))
    if kind.classes == 1:
        layers.append(nn.Flatten(0))  # [B, 1] -> [B]
    return layers
