"""Two real processes with a gloo group, for tests. They are started once and stay until a function fails in them."""

from __future__ import annotations

import atexit
import faulthandler
import io
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["RankFailedError", "run_on_two_processes"]

#: Seconds that the other rank gets to answer when one has failed: it may wait for the failed one for ever.
_GRACE = 3.0


class RankFailedError(AssertionError):
    """A function raised, died or did not end in one of the processes; the text holds the tracebacks."""


def run_on_two_processes(function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Return ``[function(0, *args), function(1, *args)]``, each from a process of its own.

    They have a default group, which stays (older versions of gloo hang when groups come and go), and 1 thread; for each
    call the seed is 0, and warnings are errors if they are errors here.

    Args:
        function: of a module's top level; it is found by its name. Called as ``function(rank, *args)``.
        args: what ``torch.save`` can store, as must be the results. Each process gets a copy.
        timeout: seconds for everything.

    Raises:
        RankFailedError: an exception, an exit or no answer in time.
    """
    global _pair
    if _pair is None:
        _pair = _Pair()
    try:
        return _pair.run(function, args, time.monotonic() + timeout)
    except RankFailedError:
        _pair.end()  # one may wait for the other, or have missed a collective
        _pair = None
        raise


class _Pair:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        atexit.register(self._folder.cleanup)
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs, self._folder.name), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], deadline: float) -> list[Any]:
        action = warnings.filters[0][0] if warnings.filters else "default"  # what pytest was told
        patience = 0.9 * (deadline - time.monotonic())  # then each process notes where it stands
        for pipe in self._pipes:
            pipe.send_bytes(_packed((function, args, action, patience)))
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < 2:
            waiting = [rank for rank in range(2) if rank not in answers]
            ready = multiprocessing.connection.wait(
                [self._pipes[rank] for rank in waiting], max(deadline - time.monotonic(), 0)
            )
            if not ready:
                break
            for rank in waiting:
                if self._pipes[rank] in ready:
                    answers[rank] = self._receive(rank)
                    if not answers[rank][0]:
                        deadline = min(deadline, time.monotonic() + _GRACE)
        for rank in range(2):
            if rank not in answers:
                place = Path(self._folder.name) / f"rank {rank}"
                answers[rank] = False, "no answer in time\n" + (place.read_text() if place.exists() else "")
        if not all(succeeded for succeeded, _ in answers.values()):
            raise RankFailedError(
                "\n".join(
                    f"rank {rank}: {text}" for rank, (succeeded, text) in sorted(answers.items()) if not succeeded
                )
            )
        return [answers[0][1], answers[1][1]]

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            succeeded, result = torch.load(io.BytesIO(self._pipes[rank].recv_bytes()), weights_only=False)
        except EOFError:
            self._processes[rank].join(1)
            return False, f"the process died with exit code {self._processes[rank].exitcode}"
        return succeeded, result

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


_pair: _Pair | None = None


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _serve(rank: int, pipe: Any, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # daemons may have no children
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    with (Path(folder) / f"rank {rank}").open("w") as notes:
        while True:
            try:
                pipe.send_bytes(_answer(rank, pipe.recv_bytes(), notes))
            except (EOFError, KeyboardInterrupt):
                return


def _answer(rank: int, message: bytes, notes: Any) -> bytes:
    try:
        function, args, action, patience = torch.load(io.BytesIO(message), weights_only=False)
        faulthandler.dump_traceback_later(patience, file=notes)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            return _packed((True, function(rank, *args)))
    except BaseException:
        return _packed((False, traceback.format_exc()))
    finally:
        faulthandler.cancel_dump_traceback_later()
