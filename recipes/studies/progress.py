"""How far a study is: a bar in a terminal, otherwise a line now and then, on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..runtime.errors import need
from ..runtime.tables import duration_text
from .study import Cell, Study

#: Between two lines where standard error is no terminal.
_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def told(study: Study, speaks: bool) -> Iterator[Callable[[Cell, Mapping[str, Any]], None]]:
    """Within, tell of every training that ends, with a guess of the time that is left.

    Args:
        study: before its first training.
        speaks: whether this process tells anything.
    """
    total, done, began = study.trainings, study.done, time.monotonic()
    first, line = done, -_SECONDS_BETWEEN_LINES
    in_terminal = speaks and sys.stderr.isatty()
    bar = need("tqdm").tqdm(total=total, initial=done, unit="training", disable=not in_terminal)

    def tell(cell: Cell, result: Mapping[str, Any]) -> None:
        nonlocal done, line
        before, done = done, max(study.done, done + 1)  # a training that several tables have in common counts in each
        what = f"{cell.setting.key}, {cell.method.key}, seed {cell.seed}"
        bar.set_description("reported" if cell.reported else "tuning")
        bar.set_postfix_str(f"last: {what}")
        bar.update(done - before)
        now = time.monotonic()
        if in_terminal or not speaks or (now - line < _SECONDS_BETWEEN_LINES and done < total):
            return
        line = now
        left = (now - began) / (done - first) * (total - done)
        score = result["validation"]
        text = "no score" if score is None else f"validation score {score:.4f}"
        print(f"{done} of {total} trainings ({what}: {text}), {duration_text(left)} left", file=sys.stderr, flush=True)

    with bar:
        yield tell
