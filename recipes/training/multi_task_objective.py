"""Losses and predictions of tasks of any kind, with missing labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.task_kinds import TaskKind
from .objective import Objective, TaskLosses

__all__ = ["MultiTaskObjective"]


class MultiTaskObjective(Objective):
    """For batches of inputs, whatever the model takes, and labels ``[b, T]``, NaN where one is missing.

    A sample without a label takes part in the saliency all the same: its outputs are computed, and its loss has weight 0.

    Args:
        kinds: of the tasks, in the order of the columns of the labels.
        apart: keep the graphs of the tasks apart, for surgery on parameters.
    """

    def __init__(self, kinds: Mapping[str, TaskKind], apart: bool = False) -> None:
        self.tasks = tuple(kinds)
        self._kinds = tuple(kinds.values())
        # All at once: some operations instead of some for each task.
        self._at_once = not apart and all(kind.name == "binary" for kind in self._kinds)

    def losses(self, model: nn.Module, batch: tuple[Any, Tensor]) -> TaskLosses:
        inputs, labels = batch
        outputs = self._outputs(model, inputs)
        known = torch.nan_to_num(labels)
        if self._at_once:
            logits = torch.stack(outputs)
            return functional.binary_cross_entropy_with_logits(logits, known.T.to(logits), reduction="none")
        return [_losses(kind, *pair) for kind, pair in zip(self._kinds, zip(outputs, known.unbind(1)))]

    def predictions(self, model: nn.Module, batch: tuple[Any, Tensor]) -> dict[str, Tensor]:
        inputs, labels = batch
        outputs = [output.float().reshape(len(labels), -1) for output in self._outputs(model, inputs)]
        return {"outputs": torch.cat(outputs, dim=1), "labels": labels}

    def weights(self, batch: tuple[Any, Tensor]) -> Tensor:
        # Also where no label is missing: other micro-batches of the step, or other processes, may have missing ones.
        return (~torch.isnan(batch[1])).T.float()

    def regularizer_arguments(self, batch: tuple[Any, Tensor], losses: TaskLosses) -> dict[str, Any]:
        # Of this micro-batch, and only for the report of the penalty's share.
        stacked = (losses if isinstance(losses, Tensor) else torch.stack(list(losses))).detach()
        if not stacked.shape[1]:
            return {}
        known = ~torch.isnan(batch[1]).T
        return {"losses": ((stacked * known).sum(1) / known.sum(1).clamp(min=1)).sum()}

    def _outputs(self, model: nn.Module, inputs: Any) -> list[Tensor]:
        outputs = model(inputs)
        return [outputs[task] for task in self.tasks]


def _losses(kind: TaskKind, output: Tensor, labels: Tensor) -> Tensor:
    """``[b]``."""
    if kind.name == "binary":
        return functional.binary_cross_entropy_with_logits(output, labels.to(output), reduction="none")
    if kind.name == "classes":
        return functional.cross_entropy(output, labels.long(), reduction="none")
    return (output - (labels.to(output) - kind.mean) / kind.spread).square()
