"""What a recipe tells the engine about its tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Objective", "TaskLosses"]

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

    def regularizer_arguments(self, batch: Any, losses: TaskLosses) -> Mapping[str, Any]:
        """What the saliency regularizer is called with, such as ``mask=`` or, for its share, ``losses=``."""
        del batch, losses
        return {}
