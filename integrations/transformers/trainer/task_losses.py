"""The losses of single tasks in a Trainer: over the labels of a whole optimizer step, and in the logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....torch_tools import state_dtype
from ..model.losses import known_labels


def label_counts(labels: Any, tasks: Sequence[str], device: torch.device) -> Tensor:
    """Return ``[T]``, the known labels of each task in a batch; zeros where its labels are no dictionary."""
    given = labels if isinstance(labels, Mapping) else {}
    counts = [known_labels(own).sum() if isinstance(own := given.get(task), Tensor) else 0 for task in tasks]
    found = torch.stack([torch.as_tensor(count, device=device) for count in counts])
    return found.to(state_dtype(found.device))


class TaskLosses:
    """Adds up ``{task: mean loss}`` of batches, until they are taken for a log."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self._batches: list[tuple[Tensor, Tensor]] = []

    def add(self, losses: Mapping[str, Tensor], counts: Tensor) -> None:
        """Note the losses of a batch, ``counts`` are its known labels ``[T]``."""
        zero = torch.zeros((), device=counts.device)
        means = torch.stack([losses.get(task, zero).detach().to(zero) for task in self.tasks])
        sums, labels = self._batches.pop() if self._batches else (0, 0)
        self._batches.append((sums + means.to(counts) * counts, labels + counts))

    def take(self, gather: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
        """Return ``{task: mean over its labels}``, and begin anew; ``gather`` joins those of several processes."""
        zeros = torch.zeros(len(self.tasks), dtype=torch.float64)
        found = torch.stack(self._batches.pop() if self._batches else (zeros, zeros))
        if gather is not None:
            found = gather(found).view(-1, 2, len(self.tasks)).sum(0)
        sums, labels = found.tolist()
        return {task: own / count for task, own, count in zip(self.tasks, sums, labels) if count}


def over_the_step(
    loss: Tensor, losses: Mapping[str, Tensor], weights: Mapping[str, float], shares: Mapping[str, Tensor]
) -> Tensor:
    """Return the loss of a micro-batch such that the mean over those of a step is that of one batch of all.

    ``loss`` has the mean over the labels of the micro-batch for each task, times its weight; ``shares`` are what it is to be
    multiplied by: the labels here, of those in an average micro-batch of the step.
    """
    parts: Iterable[Tensor] = (weights[task] * own * (shares[task] - 1).to(own) for task, own in losses.items())
    return sum(parts, start=loss)
