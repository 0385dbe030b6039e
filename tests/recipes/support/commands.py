"""Recipes as commands: in this process, in a child, in several processes, and stopped in the middle."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .small_training import as_rank

ROOT = Path(__file__).parents[3]
Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit code and texts."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The error text in one line, as it may be broken anywhere."""
        return " ".join(self.err.split())


def call(main: Main, *arguments: str | Path) -> Answer:
    """Run a recipe in this process; an error of its command line is an exit code, too."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as stop:
            code = stop.code
    return Answer(code, out.getvalue(), err.getvalue())


def call_on_rank(rank: int, main: Main, arguments: Sequence[str]) -> tuple[int, str, str]:
    """The same in one of two processes, for ``run_on_two_processes``."""
    as_rank(rank)
    answer = call(main, *arguments)
    return answer.code, answer.out, answer.err


def start(module: str, *arguments: str | Path, processes: int = 1) -> subprocess.Popen[str]:
    """Start a recipe in a child with one thread, whose group Ctrl-C can be sent to.

    Args:
        module: such as ``"recipes.digits"``.
        arguments: of its command line.
        processes: more than one are started by ``torchrun``.
    """
    launcher: list[str] = []
    if processes > 1:
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            str(_free_port()),
        ]
    # Without what a launcher around the tests may have set.
    ours = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # A shell that started pytest in the background may have left the signal ignored, which is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**ours, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[str], seconds: float = 120.0) -> Answer:
    """Wait for a child; after this time it is killed, with all that it has started."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return Answer(process.returncode, out, err)


def run_in_child(module: str, *arguments: str | Path, processes: int = 1) -> Answer:
    """Run a recipe in a child, as users do it."""
    return finish(start(module, *arguments, processes=processes))


def stop(process: subprocess.Popen[str], number: int, wanted: Callable[[], object], seconds: float = 90.0) -> Answer:
    """Send a child a signal as soon as something is there; SIGINT to all its processes, as a terminal does."""
    deadline = time.monotonic() + seconds
    try:
        while not wanted():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.002)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    except BaseException:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return finish(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
