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

from ..methods.methods import METHODS
from ..runtime.errors import DataError
from ..runtime.files import finite, machine, now, versions

#: Of every line.
_BEGINNING = b'{"cell": '


def key_of(cell: Mapping[str, Any]) -> str:
    """Identify everything that a result depends on; earlier names of methods count as the present ones."""
    plain = finite(cell)
    if isinstance(plain.get("method"), str):
        plain["method"] = METHODS.name_of(plain["method"])
    return hashlib.sha256(json.dumps(plain, sort_keys=True, allow_nan=False).encode()).hexdigest()[:20]


@contextlib.contextmanager
def timed(data: str) -> Iterator[dict[str, Any]]:
    """Note what should be known about a result but does not tell it from others; complete after the context.

    Args:
        data: fingerprint of the data.
    """
    about: dict[str, Any] = {"data": data, "date": now(), "machine": machine(), "versions": versions()}
    started, worked = time.monotonic(), time.process_time()
    yield about
    about["seconds"] = round(time.monotonic() - started, 1)
    about["processor_seconds"] = round(time.process_time() - worked, 1)


class ResultsFile:
    """The results so far. Only one process may write; a run that is killed loses the line it was writing, and no other.

    Args:
        path: of the file, in JSON Lines; need not exist.
        writes: whether results are written, and not only kept.

    Raises:
        DataError: it is no such file, or cannot be read.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self._path = path
        self.writes = writes
        self._entries: dict[str, dict[str, Any]] = {}
        self._whole = 0
        self._waiting = b""
        #: Why the last results could not be written, if they could not.
        self.not_written: str | None = None
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @property
    def data(self) -> set[str]:
        """Fingerprints of the data behind the results."""
        return {entry["about"]["data"] for entry in self._entries.values() if "data" in entry["about"]}

    @property
    def about(self) -> list[dict[str, Any]]:
        """What is known about each result: date, machine, versions, seconds."""
        return [entry["about"] for entry in self._entries.values()]

    def get(self, cell: Mapping[str, Any]) -> dict[str, Any] | None:
        """Its result, if it was computed."""
        entry = self._entries.get(key_of(cell))
        return None if entry is None else entry["result"]

    def add(self, cell: Mapping[str, Any], result: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Keep a result, and write it; where a disk is full it waits for the next one."""
        line = json.dumps(finite({"cell": cell, "result": result, "about": about}), allow_nan=False)
        self._entries[key_of(cell)] = json.loads(line)
        self._waiting += line.encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Try again to write what waits."""
        if not self.writes or not self._waiting.strip():
            return
        try:
            with self._path.open("r+b" if self._path.exists() else "wb") as file:
                file.seek(self._whole)
                file.truncate()  # half a line of a run that was killed
                file.write(self._waiting)
                file.flush()
                os.fsync(file.fileno())
                self._whole, self._waiting, self.not_written = file.tell(), b"", None
        except OSError as error:
            if self.not_written is None:
                text = f"{self._path} could not be written ({error.strerror}). The run goes on, and its results wait."
                warnings.warn(text, stacklevel=2)
            self.not_written = error.strerror or str(error)

    def _read(self) -> None:
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise DataError(f"{self._path} cannot be read ({error.strerror}). Pass another file.") from error
        whole, newline, rest = content.rpartition(b"\n")
        if _is_result(rest):  # but for its end, which an editor may have taken
            whole, newline, rest, self._waiting = content, b"", b"", b"\n"
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._entries[key_of(entry["cell"])] = {"result": entry["result"], "about": entry["about"]}
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(f"line {number} of {self._path} is no result ({error}). Pass another file.") from error
        self._whole = len(whole) + len(newline)
        if rest and not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
            raise DataError(f"the last line of {self._path} is no result. Pass another file.")
        if rest:
            warnings.warn(f"{self._path} ends in half a line, of a run that was killed: it is dropped.", stacklevel=3)


def _is_result(line: bytes) -> bool:
    try:
        return line.startswith(_BEGINNING) and isinstance(json.loads(line), dict)
    except ValueError:
        return False
