"""Every name of a sweep in a process of its own, and the table of their results."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..runs.command_line import whole_number
from ..runtime.tables import aligned

#: What a child prints in front of its result.
_MARK = "result of a sweep: "

Result = dict[str, Any]
Check = Callable[[str], Result]
#: (name, reason, seconds) -> the result in place of one that a child did not give.
Failed = Callable[[str, str, float], Result]


def run_all(
    check: Check, failed: Failed, names: Sequence[str], processes: int, seconds: int
) -> Iterator[tuple[str, Result]]:
    """Yield each name with its result as soon as that is there; each of ``processes`` children has ``seconds``."""
    pool = ThreadPoolExecutor(processes)
    try:
        waiting = {pool.submit(in_child, check, failed, name, seconds): name for name in names}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C no other child starts


def in_child(check: Check, failed: Failed, name: str, seconds: int) -> Result:
    """Check one name where a crash or an endless loop of its model is not that of the sweep."""
    begun = time.monotonic()
    command = [sys.executable, "-m", __spec__.name, str(os.getpid()), check.__module__, check.__name__, name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=root)
    except subprocess.TimeoutExpired:
        return failed(name, f"not finished within {seconds} seconds", time.monotonic() - begun)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            result: Result = json.loads(line[len(_MARK) :])
            return result
    last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
    return failed(name, f"the process ended with code {done.returncode}: {last}", time.monotonic() - begun)


def report(
    rows: Sequence[Sequence[str]], left: int, totals: Sequence[str], reasons: Sequence[Sequence[str]] = ()
) -> str:
    """The table, its first ``left`` columns flush left; what does not work, and why; and the totals."""
    parts = [aligned(rows, left)]
    if reasons:
        parts.append("What does not work:\n\n" + aligned(reasons, left=len(reasons[0])))
    return "\n\n".join([*parts, "\n".join(totals)])


def add_limits(parser: argparse.ArgumentParser, option: str, what: str) -> None:
    """Add ``processes``, under the name of this option, and ``seconds`` of each child."""
    count, at_a_time = whole_number(1), f"{what}s at a time (default: 2)"
    parser.add_argument(option, dest="processes", type=count, default=2, metavar="N", help=at_a_time)
    limit = f"limit for each {what} (default: 900)"
    parser.add_argument("--seconds", type=count, default=900, metavar="N", help=limit)


def check_names(
    parser: argparse.ArgumentParser, argument: str, chosen: Sequence[str], known: Collection[str], what: str
) -> None:
    """End with an error that says what is near, if one of the names is not known; ``what`` stands in front of it."""
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            parser.error(f"argument {argument}: {what} {name!r}.{hint} They are: {' '.join(known)}")


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # a child whose sweep was killed would go on for nobody


if __name__ == "__main__":
    parent, module, function, name = sys.argv[1:]
    if os.name == "posix":  # elsewhere a launcher may stand between a process and its parent
        threading.Thread(target=_end_with_parent, args=(int(parent),), daemon=True).start()
    print(_MARK + json.dumps(getattr(importlib.import_module(module), function)(name)), flush=True)
