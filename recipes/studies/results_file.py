"""Results that are computed once: a file with one line for each training, found again by everything it depends on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..runtime.errors import DataError
from ..runtime.files import finite, machine, now, versions

__all__ = ["CellFile", "key_of", "timed"]


#: Of every line.
_BEGINNING = b'{"cell": '


def key_of(cell: Mapping[str, Any]) -> str:
    """Of everything that a result depends on, as plain numbers and texts."""
    text = json.dumps(finite(cell), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _is_result(line: bytes) -> bool:
    try:
        return line.startswith(_BEGINNING) and isinstance(json.loads(line), dict)
    except ValueError:
        return False


@contextlib.contextmanager
def timed(data: str) -> Iterator[dict[str, Any]]:
    """What should be known about a result but does not tell it from others; complete after the context.

    Args:
        data: fingerprint of the data.
    """
    about: dict[str, Any] = {"data": data, "date": now(), "machine": machine(), "versions": versions()}
    started, worked = time.monotonic(), time.process_time()
    yield about
    about["seconds"] = round(time.monotonic() - started, 1)
    about["processor_seconds"] = round(time.process_time() - worked, 1)


class CellFile:
    """The results so far. Only one process may write; a run that is killed loses the line it was writing, and no other.

    Args:
        path: of the file, in JSON Lines; need not exist.

    Raises:
        DataError: it is no such file, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._results: dict[str, dict[str, Any]] = {}
        #: Fingerprints of the data behind the results.
        self.data: set[str] = set()
        self._whole = 0
        self._separator = b""
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._results)

    def get(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
        """Its result, if it was computed."""
        return self._results.get(key_of(cell))

    def add(self, cell: Mapping[str, Any], result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write a result, with what should be known about it but does not tell it from others."""
        line = json.dumps(finite({"cell": cell, "result": result, "about": about}), allow_nan=False)
        with self._path.open("r+b" if self._path.exists() else "wb") as file:
            file.seek(self._whole)
            file.truncate()  # half a line of a run that was killed
            file.write(self._separator + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._whole, self._separator = file.tell(), b""
        entry = json.loads(line)
        self._keep(entry)

    def _keep(self, entry: Mapping[str, Any]) -> None:
        self._results[key_of(entry["cell"])] = entry["result"]
        if "data" in entry["about"]:
            self.data.add(entry["about"]["data"])

    def _read(self) -> None:
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise DataError(f"{self._path} cannot be read ({error.strerror}). Pass another file.") from error
        whole, newline, rest = content.rpartition(b"\n")
        if _is_result(rest):  # but for its end, which an editor may have taken
            whole, newline, rest, self._separator = content, b"", b"", b"\n"
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._keep(entry)
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(f"line {number} of {self._path} is no result ({error}). Pass another file.") from error
        self._whole = len(whole) + len(newline)
        if rest and not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
            raise DataError(f"the last line of {self._path} is no result. Pass another file.")
        if rest:
            warnings.warn(f"{self._path} ends in half a line, of a run that was killed: it is dropped.", stacklevel=3)
