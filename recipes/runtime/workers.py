"""Trainings in several processes, one thread each, that end with Ctrl-C and with their parent."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from .errors import RecipeError
from .termination import TERMINATED, Terminated, listen

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(contextlib.ExitStack):
    """A context in which trainings run, in this process or in several others.

    Small convolutions gain nothing from a second thread (measured on two cores: 6.7 against 8.7 ms a step on a quiet
    machine, 22 against 7 ms on a busy one), but much from a second process.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._count == 1:
            self.callback(torch.set_num_threads, torch.get_num_threads())
            self.callback(_logger.setLevel, _logger.level)
            _be_quiet()
            return self
        others = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")  # torch has threads, which a fork does not survive
        self._executor = self.enter_context(ProcessPoolExecutor(self._count, context, initializer=_start_worker))

        def end(kind: Any, *_: Any) -> None:
            if kind is not None:  # such as Ctrl-C: what runs is not waited for, but may write a checkpoint
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()

        self.push(end)
        return self

    def run_all(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, ordered: bool = True
    ) -> Iterator[Result]:
        """Results in the order of the items, or each as soon as it is there; the same ones for any number of processes.

        Raises:
            RecipeError: a process was killed, for lack of memory for instance.
        """
        if self._executor is None:
            yield from map(function, items)
            return
        with _interrupt_blocked():
            # Not executor.map: it cancels what is left, on which the executor stumbles when its processes end.
            futures = [self._executor.submit(_run, function, item) for item in items]
        try:
            for future in futures if ordered else as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise RecipeError(
                "a process that trains was killed, perhaps for lack of memory. Pass a smaller number after --workers."
            ) from error


_logger = logging.getLogger("saliency_reg")


def _be_quiet() -> None:
    torch.set_num_threads(1)
    _logger.setLevel(logging.ERROR)  # the recipe says once what each training would say


@contextlib.contextmanager
def _interrupt_blocked() -> Iterator[None]:
    """A process started inside never sees the Ctrl-C that a terminal sends to all of them: its parent ends it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(function: Callable[[Item], Result], item: Item) -> Result:
    try:
        return function(item)
    except Terminated:
        os._exit(TERMINATED)  # otherwise the executor would hand the next item to this process


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listen()
    _be_quiet()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker whose parent was killed would wait for its next job for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
