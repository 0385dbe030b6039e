"""What gives a training its samples, and samples that are all in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .task_kinds import TaskKind


class SampleSource(Protocol):
    """A map-style dataset of single samples, as in PyTorch.

    Before each sample the global generators (Python, NumPy, PyTorch) are seeded from the seed of the training, the epoch and
    the index, so that augmentation may draw from them.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class BatchSource(Protocol):
    """A dataset that gives many samples at once, such as rows of tensors. It has to draw nothing."""

    def __len__(self) -> int: ...
    def rows_as_batch(self, indices: Sequence[int], /) -> Any:
        """The samples as a batch: tensors ``[b, ...]``, in tuples, lists or mappings."""


Source = SampleSource | BatchSource


#: Single samples to a batch.
Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Examples:
    """Samples in memory: inputs ``[N, ...]``, labels ``[N, T]``, NaN where one is missing, and their rows in the data."""

    inputs: Tensor
    labels: Tensor
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.inputs)

    def rows_as_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(indices)
        return self.inputs[index], self.labels[index]


@dataclass(frozen=True)
class Splits:
    """Three disjoint sets of examples with the same tasks."""

    kinds: Mapping[str, TaskKind]
    train: Examples
    validation: Examples
    test: Examples

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.kinds)
