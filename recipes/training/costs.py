"""What a training costs: time, and how many bytes its tensors have at a time."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def clock(device: torch.device) -> float:
    """Seconds of the processor, for all threads of this process; with a GPU those of the clock, when its work is done."""
    if device.type == "cpu":
        return time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


class LiveBytes(TorchDispatchMode):
    """Within it, counts the memory of the tensors that are there and of those that operations return, once each.

    What an operation needs for itself, and frees before it returns, is not seen.

    Args:
        tensors: that are there.

    Attributes:
        now: bytes of those that were not freed since.
        peak: the most at a time.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, id(storage), size).atexit = False

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.now -= size


class _OnDevice:
    """The same figure of a GPU, as its allocator has it."""

    peak = 0


@contextlib.contextmanager
def live_bytes(device: torch.device, tensors: Iterable[Tensor]) -> Iterator[LiveBytes | _OnDevice]:
    """Measure what happens within: ``peak`` of what it gives has the bytes, afterwards.

    Args:
        device: on which the tensors are.
        tensors: that are there before.
    """
    if device.type != "cuda":
        with LiveBytes(tensors) as counted:
            yield counted
        return
    found = _OnDevice()
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    found.peak = torch.cuda.max_memory_allocated(device)
