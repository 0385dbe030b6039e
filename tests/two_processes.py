"""Two real processes with a gloo group, for tests. They are started once and stay for the whole test session."""

from __future__ import annotations

import io
import multiprocessing
import multiprocessing.connection
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

    The default group is initialised anew for each call, threads are set to 1, the seed to 0, and warnings are errors
    if they are errors here.

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
    except _BrokenPairError as error:
        _pair.end()
        _pair = None
        raise RankFailedError(str(error)) from None


class _BrokenPairError(Exception):
    """The processes cannot be used again."""


class _Pair:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], deadline: float) -> list[Any]:
        action = warnings.filters[0][0] if warnings.filters else "default"  # what pytest was told
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self._pipes:
                pipe.send_bytes(_packed((function, args, str(Path(folder) / "rendezvous"), action)))
            answers: list[Any] = [None, None]
            waiting, died = set(range(2)), False
            while waiting:
                left = deadline - time.monotonic()
                ready = multiprocessing.connection.wait([self._pipes[rank] for rank in waiting], max(left, 0))
                if not ready:
                    raise _BrokenPairError(_told(answers, waiting))
                for rank in [rank for rank in waiting if self._pipes[rank] in ready]:
                    try:
                        answers[rank] = torch.load(io.BytesIO(self._pipes[rank].recv_bytes()), weights_only=False)
                    except EOFError:
                        died = True
                        self._processes[rank].join(1)
                        answers[rank] = (False, f"the process died with exit code {self._processes[rank].exitcode}\n")
                    waiting.remove(rank)
                    if not answers[rank][0]:
                        deadline = min(deadline, time.monotonic() + _GRACE)
            if not died:
                for pipe in self._pipes:
                    pipe.send_bytes(b"both have answered")
        if not all(succeeded for succeeded, _ in answers):
            raise (_BrokenPairError if died else RankFailedError)(_told(answers, waiting))
        return [result for _, result in answers]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()


_pair: _Pair | None = None


def _told(answers: list[Any], waiting: set[int]) -> str:
    lines = [f"rank {rank} did not answer in time" for rank in sorted(waiting)]
    lines += [
        f"rank {rank}:\n{answer[1]}" for rank, answer in enumerate(answers) if answer is not None and not answer[0]
    ]
    return "\n".join(lines)


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _serve(rank: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            message = pipe.recv_bytes()
            pipe.send_bytes(_answer(rank, message))
            pipe.recv_bytes()  # not before both have answered: a group that goes away breaks the other rank
        except (EOFError, KeyboardInterrupt):
            return
        if dist.is_initialized():
            dist.destroy_process_group()


def _answer(rank: int, message: bytes) -> bytes:
    try:
        function, args, rendezvous, action = torch.load(io.BytesIO(message), weights_only=False)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
        dist.barrier()  # now the other one is connected, too
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            return _packed((True, function(rank, *args)))
    except BaseException:
        return _packed((False, traceback.format_exc()))
