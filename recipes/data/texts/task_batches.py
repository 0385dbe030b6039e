"""Batches of one task each, drawn from several sets of examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from ...runtime.random_state import derived_seed


class SetExamples(Dataset[dict[str, Any]]):
    """The examples of all tasks, one set behind the other; each with the label of its own task.

    Args:
        encodings: ``{task: inputs of each example}``.
        labels: ``{task: label of each example}``.
    """

    def __init__(
        self, encodings: Mapping[str, Sequence[Mapping[str, Any]]], labels: Mapping[str, Sequence[Any]]
    ) -> None:
        self._rows = [
            {**inputs, "labels": {task: label}}
            for task, own in encodings.items()
            for inputs, label in zip(own, labels[task])
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


class TaskBatches(Sampler[list[int]]):
    """Row numbers of batches of one task each.

    An epoch has as many batches as one pass over all sets would have. The share of a task is proportional to
    ``size**exponent`` (at least one batch), and the order is drawn. Within a task rows come in passes: each one once,
    newly shuffled in each pass, on from where the epoch before ended. All of that depends on the seed and the number of
    the epoch alone.

    Args:
        sizes: examples of each task, which are numbered one set behind the other.
        batch_size: rows of a batch; the last one of a pass may have fewer.
        exponent: 1: each row is as likely; 0: each task.
        seed: of the draws.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, exponent: float, seed: int) -> None:
        self.sizes = tuple(sizes)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self._per_pass = [math.ceil(size / batch_size) for size in sizes]
        #: Batches of each task in an epoch.
        self.quotas = _quotas([size**exponent for size in sizes], sum(self._per_pass))
        self._passes: dict[int, tuple[int, list[int]]] = {}

    def set_epoch(self, epoch: int) -> None:
        """The epoch that is iterated over next, from 0 on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.quotas)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.Generator().manual_seed(derived_seed(self.seed, "tasks", self.epoch))
        tasks = torch.repeat_interleave(torch.tensor(self.quotas))[torch.randperm(len(self), generator=order)]
        following = [self.epoch * quota for quota in self.quotas]
        for task in tasks.tolist():
            yield self._batch(task, following[task])
            following[task] += 1

    def _batch(self, task: int, number: int) -> list[int]:
        """Batch ``number`` of all that a task ever has."""
        turn, place = divmod(number, self._per_pass[task])
        if self._passes.get(task, (-1, []))[0] != turn:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, "rows", task, turn))
            shuffled = torch.randperm(self.sizes[task], generator=generator) + sum(self.sizes[:task])
            self._passes[task] = (turn, shuffled.tolist())
        return self._passes[task][1][place * self.batch_size : (place + 1) * self.batch_size]


def _quotas(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights, at least 1 each; what rounding leaves goes to the largest remainders."""
    shares = [total * weight / sum(weights) for weight in weights]
    quotas = [max(1, math.floor(share)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda task: quotas[task] - shares[task])
    for task in by_remainder[: max(0, total - sum(quotas))]:
        quotas[task] += 1
    return quotas
