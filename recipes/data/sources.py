"""What gives a training its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

__all__ = ["BatchSource", "Collate", "SampleSource", "Source"]


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
