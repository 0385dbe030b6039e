"""Global batches that depend on a seed and an epoch alone, split over processes and micro-batches.

Neither the number of processes, nor that of micro-batches, nor that of data workers changes what is in a batch, or what is
drawn for a sample.
"""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from ..data.sources import BatchSource, Collate, Source
from ..runtime.errors import OptionError
from ..runtime.random_state import derived_seed, kept_random_state, seed_host

#: So long a data worker goes on after SIGTERM, for the step and the checkpoint of its training.
_SECONDS_TO_SAVE = 30.0


@dataclass(frozen=True)
class MicroBatch:
    """What one process passes through the model at once; without indices, a batch of no rows in the format of others.

    The epoch is for the random numbers of the samples.
    """

    epoch: int
    indices: Sequence[int]


@dataclass(frozen=True)
class Step:
    """One optimizer step: the sizes of its micro-batches, summed over the processes, and those of this process."""

    sizes: tuple[int, ...]
    own: tuple[MicroBatch, ...]

    @property
    def size(self) -> int:
        """Samples of all processes and micro-batches together."""
        return sum(self.sizes)


@dataclass(frozen=True)
class GlobalBatches:
    """The steps of every epoch, as one process sees them.

    Attributes:
        samples: how many there are.
        batch_size: of all processes and micro-batches together; the last batch of an epoch may be smaller.
        seed: of the order.
        accumulation: micro-batches of a step, fewer where there are not as many samples.
        ranks, rank: number of processes, and which one this is.
    """

    samples: int
    batch_size: int
    seed: int
    accumulation: int = 1
    ranks: int = 1
    rank: int = 0

    def __len__(self) -> int:
        """Steps of an epoch."""
        return -(-self.samples // self.batch_size)

    def order(self, epoch: int) -> list[int]:
        """All samples, in the order of this epoch."""
        generator = torch.Generator().manual_seed(derived_seed("order", self.seed, epoch))
        order: list[int] = torch.randperm(self.samples, generator=generator).tolist()
        return order

    def steps(self, epoch: int) -> list[Step]:
        """All steps of this epoch."""
        order = self.order(epoch)
        starts = range(0, self.samples, self.batch_size)
        return [self._step(epoch, order[start : start + self.batch_size]) for start in starts]

    def _step(self, epoch: int, rows: list[int]) -> Step:
        shares = np.array_split(rows, self.ranks)
        count = min(self.accumulation, len(shares[0]))
        split = [np.array_split(share, count) for share in shares]
        sizes = tuple(sum(map(len, micro)) for micro in zip(*split))
        return Step(sizes, tuple(MicroBatch(epoch, own.tolist()) for own in split[self.rank]))


class Feed:
    """Loads micro-batches with as many data workers, which are started once. The results do not depend on their number.

    The seed is that of what is drawn for samples. Without workers, this process loads; ``collate`` is for a
    :class:`SampleSource`.
    """

    def __init__(
        self, source: Source, seed: int, *, workers: int = 0, collate: Collate | None = None, pin_memory: bool = False
    ) -> None:
        self._wanted: list[MicroBatch] = []  # takes the place of the batch sampler, which a loader keeps
        self._loader: DataLoader[Any] = DataLoader(
            _Batches(source, seed, collate or default_collate, in_worker=workers > 0),  # type: ignore[arg-type]
            batch_sampler=self._wanted,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            # PyTorch's default on Linux, but not within processes that were spawned themselves: there each data worker would
            # import everything anew.
            multiprocessing_context="fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None,
            # A signal to all processes of a group is for the training, which saves and then ends its workers.
            worker_init_fn=_outlive_termination if workers else None,
            # By default it would take a number from the global generator in every epoch, and again after a resume.
            generator=torch.Generator(),
        )

    def __call__(self, wanted: Sequence[MicroBatch]) -> Iterator[Any]:
        """The batches, in order."""
        self._wanted[:] = wanted
        return iter(self._loader)

    def close(self) -> None:
        """End the data workers, whoever still holds an iterator over their batches."""
        iterator = self._loader._iterator
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()


@dataclass(frozen=True)
class _Batches:
    """The dataset of the loader: its "indices" are whole micro-batches."""

    source: Source
    seed: int
    collate: Collate
    in_worker: bool

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, wanted: MicroBatch) -> Any:
        if wanted.indices:
            return self._batch(wanted.epoch, wanted.indices)
        return _without_rows(self._batch(wanted.epoch, [0]))

    def _batch(self, epoch: int, indices: Sequence[int]) -> Any:
        if isinstance(self.source, BatchSource):
            return self.source.rows_as_batch(indices)
        if self.in_worker:  # whose generators are its own
            return self.collate([self._sample(epoch, index) for index in indices])
        with kept_random_state():
            return self.collate([self._sample(epoch, index) for index in indices])

    def _sample(self, epoch: int, index: int) -> Any:
        seed_host(derived_seed("sample", self.seed, epoch, index))
        return self.source[index]  # type: ignore[index]


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_termination(_: int) -> None:
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(*_: Any) -> None:
    if signal.getitimer(signal.ITIMER_REAL)[0] > 0:  # asked again, by its own training
        os._exit(0)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_SAVE)


def _without_rows(batch: Any) -> Any:
    if isinstance(batch, MutableMapping):
        emptied = copy.copy(batch)  # also of a kind with methods of its own
        for key, value in batch.items():
            emptied[key] = _without_rows(value)
        return emptied
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(_without_rows, batch))
    if isinstance(batch, (list, tuple)):
        if all(isinstance(value, (str, bytes, int, float)) for value in batch):  # one for each sample
            return type(batch)()
        return type(batch)(map(_without_rows, batch))
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        return batch[:0] if batch.ndim else batch
    if batch is None or isinstance(batch, (str, bytes, int, float)):
        return batch
    raise OptionError(
        f"a process has no samples in this step, and a batch with a {type(batch).__name__} cannot be emptied. Let collate "
        "return tensors in tuples, lists or dictionaries, or choose a batch size that gives every process some."
    )
