"""Steps of models that an integration makes, or attaches the regularizer to, beside the plain step of the same model."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from saliency_reg import PCGrad, SaliencyRegularizer

from .steps import training_step
from .timing import compared, time_in_turn

#: What is timed, and the options of the regularizer, where there is one.
KINDS: dict[str, Callable[[], dict[str, Any]] | None] = {
    "plain": None,
    "with the regularizer": lambda: {"surgery": None},
    "with the regularizer w/ PCGrad (feature)": lambda: {"surgery": PCGrad()},
}


class Training(NamedTuple):
    """What a step is made of: an optimizer, a forward pass up to the loss, and how the regularizer is attached."""

    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    attach: Callable[..., SaliencyRegularizer]
    #: What the rows tell about the model.
    description: dict[str, Any]


def multi_label_loss(outputs: Tensor | Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return the sum of the task losses of logits ``[B, T]``, or of a tensor ``[B]`` for each task."""
    logits = outputs if isinstance(outputs, Tensor) else torch.stack(list(outputs.values()), dim=1)
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0).sum()


def time_kinds(
    make: Callable[[], Training], shape: str, options: argparse.Namespace, progress: str
) -> list[dict[str, Any]]:
    """Time steps of each kind on models that ``make`` returns, and return a row for each kind with the regularizer."""
    logging.getLogger("saliency_reg").setLevel(logging.ERROR)  # linear classifiers are timed on purpose
    steps = {}
    description: dict[str, Any] = {}
    for kind, chosen in KINDS.items():
        torch.manual_seed(0)
        optimizer, loss, attach, description = make()
        regularizer = None if chosen is None else attach(strength=0.1, metric="l1", optimizer=optimizer, **chosen())
        steps[kind] = training_step(optimizer, loss, regularizer)
    times = time_in_turn(steps, options.steps, options.warmup, progress)
    return [{**description, "kind": f"{shape}, {kind}", **compared(times, kind)} for kind in KINDS if kind != "plain"]
