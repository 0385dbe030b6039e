"""A log of JSON lines that can be cut back to a checkpoint."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import finite, now

#: Fields of each line that are another one in each run, whatever was trained.
CLOCK_FIELDS = ("time", "seconds")


class RunLog:
    """Appends lines to a file, each flushed, or nowhere without a path.

    Where a disk is full lines wait for the next attempt, and nothing is raised.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._started = time.monotonic()
        self._waiting = b""
        self._length = path.stat().st_size if path is not None and path.exists() else 0

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Add one line; numbers that are not finite become null."""
        if self.path is None:
            return
        clock = {"time": now(), "seconds": round(time.monotonic() - self._started, 3)}
        line = json.dumps({"event": event, **finite(values), **clock}, allow_nan=False)
        self._waiting += line.encode() + b"\n"
        self._flush(durable=False)

    def settle(self) -> int:
        """Bring everything to the disk, and return the length in bytes."""
        self._flush(durable=True)
        return self._length

    def start_anew(self) -> None:
        """Begin an empty log; an earlier one is kept beside it, with ``.old`` behind its name."""
        self._waiting = b""
        if self.path is not None and self._length:
            os.replace(self.path, self.path.with_name(f"{self.path.name}.old"))
        self._length = 0

    def cut(self, length: int) -> None:
        """Forget what is behind the first ``length`` bytes."""
        if self.path is None:
            return
        self._waiting = b""
        found = self.path.stat().st_size if self.path.exists() else 0
        if found < length:
            warnings.warn(
                f"{self.path} has {found} bytes, but had {length} when the checkpoint was written: lines are missing.",
                stacklevel=2,
            )
        elif found > length:
            os.truncate(self.path, length)
        self._length = min(found, length)

    def _flush(self, durable: bool) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what could not be written is known, and can be taken back.
            with self.path.open("ab", buffering=0) as file:
                try:
                    while self._waiting:
                        written = file.write(self._waiting)
                        self._waiting = self._waiting[written:]
                        self._length += written
                finally:
                    if durable:
                        os.fsync(file.fileno())
        except OSError as error:
            warnings.warn(f"{self.path} could not be written ({error.strerror}). Its lines wait.", stacklevel=3)
