"""SIGTERM as a polite request: a training saves after its present step, and the program ends with code 143."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

#: Exit code of a program that SIGTERM ended.
TERMINATED = 143


class Terminated(SystemExit):
    """The program was asked to end. Not an error: nothing catches it by accident, and it ends with the right code."""

    def __init__(self, message: str = "terminated") -> None:
        super().__init__(TERMINATED)
        _State.requested = False
        self.message = message


class _State:
    requested = False
    trainings = 0


def listen() -> None:
    """From now on SIGTERM raises :class:`Terminated`, at once or, within :func:`deferred`, where that sees fit."""
    _State.requested = False
    signal.signal(signal.SIGTERM, _on_signal)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """The same for a while; outside the main thread, where signals do not come, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    listen()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        _State.requested = False


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM only makes the function that is given return true; whoever asks has to raise."""
    _State.trainings += 1
    try:
        yield lambda: _State.requested
    finally:
        _State.trainings -= 1


def _on_signal(*_: Any) -> None:
    _State.requested = True
    if not _State.trainings:
        raise Terminated
