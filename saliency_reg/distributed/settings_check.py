"""Whether all processes are set up alike: compared in every call, at the price of four more numbers in its all-reduce."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, TaskError
from .ranks import Ranks

#: Where reading a number makes the host wait for the device, the processes compare their settings once in so many calls.
CALLS_BETWEEN_CHECKS = 50
#: Small enough that sums of squares are exact.
_MARKS = 2**20
#: Settings that have to be the same in all processes, in words.
Settings = Mapping[str, Any]


def marks_of(settings: Settings, relations: Tensor) -> tuple[Tensor, ...]:
    """Return checksums of settings and relations, each with its square: their sums over processes reveal a difference."""
    of_settings = zlib.crc32(repr(sorted(settings.items())).encode()) % _MARKS
    integer = torch.int64 if relations.dtype == torch.float64 else torch.int32
    bits = relations.contiguous().view(integer).flatten().long()
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    # Computed where the relations are: nothing waits for the device.
    of_relations = ((bits % 1_000_003) * places).sum() % _MARKS
    mark = torch.tensor(of_settings, device=bits.device)
    return mark, mark**2, of_relations, of_relations**2


def marks_differ(added_marks: list[Tensor], processes: int) -> bool:
    """Tell whether the marks of all processes, added up, are not those of one process times their number."""
    marks = [int(mark) for mark in added_marks]
    # The variance of each mark, in whole numbers.
    return any(square * processes != mark**2 for mark, square in zip(marks[::2], marks[1::2]))


def compare_settings(settings: Settings, ranks: Ranks) -> None:
    """Exchange the settings of all processes, and raise in all of them at once if they differ."""
    everywhere: list[Settings] = ranks.of_all(dict(settings))
    for what, own in settings.items():
        values = [other.get(what) for other in everywhere]
        if any(not _alike(value, own) for value in values):
            listed = ", ".join(f"{_shown(value)} on rank {rank}" for rank, value in enumerate(values))
            raise (TaskError if what == "tasks" else ConfigurationError)(
                f"the processes have different {what}: {listed}. Build the regularizer with the same arguments on all of "
                "them, change it on all at once, and load the same state. For a process that trains by itself pass "
                "process_group='local'."
            )


def _alike(one: Any, other: Any) -> bool:
    """Compare; lists of numbers up to rounding, which may differ between kinds of processors."""
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(one, other))
    return bool(one == other)


def _shown(value: Any) -> str:
    return f"checksum {zlib.crc32(repr(value).encode()):08x}" if isinstance(value, list) else repr(value)
