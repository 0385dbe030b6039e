"""What the engine is told about tasks: losses and predictions, also with missing labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.task_kinds import TaskKind, columns_of

#: Losses of single samples: ``[T, b]``, or T tensors ``[b]`` (for surgery on parameters, so that tasks stay apart).
TaskLosses = Tensor | Sequence[Tensor]


class Objective(ABC):
    """Losses and predictions of T tasks, for batches of ``b`` samples, which may be 0.

    The engine divides by the number of labels: methods return values of single samples.
    """

    tasks: tuple[str, ...]

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> TaskLosses:
        """Call the model, once, and return the losses of all tasks; finite where there is no label, too."""

    @abstractmethod
    def predictions(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """What metrics need, labels too: named tensors ``[b, ...]``. In eval mode, and without gradients."""

    def weights(self, batch: Any) -> Tensor | None:
        """Weights of the losses ``[T, b]``, 0 where a label is missing; ``None`` (for every batch) if none is.

        Taken on the host. The loss of a task is the weighted mean over the samples of the whole step, in all processes.
        """
        del batch
        return None

    def labels(self, batch: Any) -> Tensor | None:
        """``[b, T]``, NaN where one is missing, numbers in the units of outputs; ``None`` if there are no such labels."""
        del batch
        return None

    def regularizer_arguments(self, batch: Any, losses: TaskLosses) -> Mapping[str, Any]:
        """What the saliency regularizer is called with, such as ``mask=`` or, for its share, ``losses=``."""
        del batch, losses
        return {}

    def after_forward(self, batch: Any) -> None:
        """Called with each batch of a training step, between its forward and its backward pass."""
        del batch


class MultiTaskObjective(Objective):
    """For batches of inputs, whatever the model takes, and labels ``[b, T]``, NaN where one is missing.

    A sample without a label takes part in the saliency all the same: its outputs are computed, and its loss has weight 0.

    Args:
        kinds: of the tasks, in the order of the columns of the labels.
        apart: keep the graphs of the tasks apart, for surgery on parameters.
        of_losses: the saliency is that of the losses, of single samples.
        watch: is given the labels of each training batch between its forward and its backward pass.
    """

    def __init__(
        self,
        kinds: Mapping[str, TaskKind],
        apart: bool = False,
        of_losses: bool = False,
        watch: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.tasks = tuple(kinds)
        self._of_losses = of_losses
        self._watch = watch
        self._kinds = tuple(kinds.values())
        # All at once: some operations instead of some for each task.
        names = {kind.name for kind in self._kinds}
        self._at_once = next(iter(names)) if not apart and len(names) == 1 and names <= {"binary", "number"} else None
        self._units = torch.tensor([[kind.mean, kind.spread] for kind in self._kinds], dtype=torch.float64)

    def losses(self, model: nn.Module, batch: tuple[Any, Tensor]) -> TaskLosses:
        inputs, labels = batch
        outputs = self._outputs(model, inputs)
        known = torch.nan_to_num(labels)
        if self._at_once is not None:
            together = torch.stack(outputs)
            if self._at_once == "binary":
                return functional.binary_cross_entropy_with_logits(together, known.T.to(together), reduction="none")
            mean, spread = self._units.to(together).unsqueeze(2).unbind(1)  # [T, 1]
            return (together - (known.T.to(together) - mean) / spread).square()
        return [_losses(kind, *pair) for kind, pair in zip(self._kinds, zip(outputs, known.unbind(1)))]

    def predictions(self, model: nn.Module, batch: tuple[Any, Tensor]) -> dict[str, Tensor]:
        inputs, labels = batch
        outputs = [output.reshape(len(labels), -1) for output in self._outputs(model, inputs)]
        joined = torch.cat([output if output.dtype == torch.float64 else output.float() for output in outputs], dim=1)
        return {"outputs": joined, "labels": labels}

    def mean_losses(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """The mean loss of each task over its known labels, from predictions; NaN without any."""
        known = ~torch.isnan(labels)
        own = [outputs[:, columns] for columns in columns_of(self._kinds)]
        flat = [output.squeeze(1) if kind.classes == 1 else output for kind, output in zip(self._kinds, own)]
        losses = [_losses(kind, *pair) for kind, pair in zip(self._kinds, zip(flat, labels.nan_to_num().unbind(1)))]
        means = (torch.stack(losses, dim=1) * known).sum(0) / known.sum(0)
        return dict(zip(self.tasks, means.tolist()))

    def weights(self, batch: tuple[Any, Tensor]) -> Tensor:
        # Also where no label is missing: other micro-batches of the step, or other processes, may have missing ones.
        return (~torch.isnan(batch[1])).T.float()

    def labels(self, batch: tuple[Any, Tensor]) -> Tensor:
        numbers = torch.tensor([kind.name == "number" for kind in self._kinds])
        as_they_are = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        mean, spread = torch.where(numbers, self._units.T, as_they_are).to(batch[1].device)
        found: Tensor = ((batch[1] - mean) / spread).to(batch[1].dtype)
        return found

    def regularizer_arguments(self, batch: tuple[Any, Tensor], losses: TaskLosses) -> dict[str, Any]:
        if self._of_losses:
            # 0 where there is no label: such a sample has no saliency for the task.
            weights = self.weights(batch).to(batch[1].device)
            return {"losses": {task: own * weight for task, own, weight in zip(self.tasks, losses, weights)}}
        # Of this micro-batch, for the share of the penalty; 0 without samples.
        stacked = (losses if isinstance(losses, Tensor) else torch.stack(list(losses))).detach()
        known = ~torch.isnan(batch[1]).T
        return {"losses": ((stacked * known).sum(1) / known.sum(1).clamp(min=1)).sum()}

    def after_forward(self, batch: tuple[Any, Tensor]) -> None:
        if self._watch is not None:
            self._watch(batch[1])

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
