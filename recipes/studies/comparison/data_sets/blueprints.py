"""Blueprints whose heads are small perceptrons on one vector of each sample.

Heads of one output return ``[B, 1]``, so that a linear head is a plain ``Linear``: of these the library knows that the
saliency is the weight. :func:`with_flat_outputs` makes ``[B]`` of it behind the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

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
    example: Tensor | None = None,
) -> Blueprint:
    """A backbone, and for each task a head with one hidden layer, or none.

    Args:
        kinds: of the tasks.
        backbone: makes a backbone.
        width: of what ``vector`` gives.
        hidden: units of the hidden layer in each head; 0 for linear heads.
        activation: behind it.
        vector: makes what is between the feature map and vectors ``[B, width]``; by default they are the same.
        example: an input ``[1, ...]``, if inputs are tensors.
    """

    def tower(task: str, inputs: int) -> nn.Module:
        layers = _layers(kinds[task], inputs, hidden, activation)
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def head(task: str) -> nn.Module:
        before, own = vector(), tower(task, width)
        return own if isinstance(before, nn.Identity) else nn.Sequential(before, own)

    return Blueprint(tuple(kinds), backbone, head, width, tower, vector, example)


def perceptron(widths: tuple[int, ...], activation: str) -> Callable[[], nn.Module]:
    """What makes a backbone of these layers ``(inputs, ..., outputs)``, each with an activation."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
        return nn.Sequential(*layers)

    return make


def _layers(kind: TaskKind, inputs: int, hidden: int, activation: str) -> list[nn.Module]:
    layers: list[nn.Module] = []
    if hidden:
        layers += [nn.Linear(inputs, hidden), ACTIVATIONS[activation]()]
    return [*layers, nn.Linear(hidden or inputs, kind.classes)]


def with_flat_outputs(model: nn.Module) -> nn.Module:
    """The same model, whose outputs ``[B, 1]`` are ``[B]``."""
    model.register_forward_hook(_flat)
    return model


def _flat(model: nn.Module, inputs: Any, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    del model, inputs
    # Beside labels [B] a loss would broadcast [B, 1] to [B, B].
    return {task: own.squeeze(1) if own.shape[1:] == (1,) else own for task, own in outputs.items()}
