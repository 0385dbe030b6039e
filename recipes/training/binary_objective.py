"""Losses and predictions of binary tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .objective import Objective, TaskLosses

__all__ = ["BinaryTasks"]


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
