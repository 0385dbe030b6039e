"""What a training tells while it goes: in its log, to trackers, and to whoever watches it."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from saliency_reg import HeadPenalty
from saliency_reg.integrations.accelerate import log_report

from ..methods.backward import Backward
from ..runtime.errors import need
from ..runtime.log import RunLog
from ..runtime.tables import duration_text
from .metrics import mean_of_known
from .resume import Position

#: Figures for whoever watches, in the order in which they are told.
_WORDS = {
    "training_loss": "loss {:.4f}",
    "validation_score": "validation score {:.4f}",
    "validation_auc": "validation AUC {:.4f}",
    "penalty_share": "penalty {:.1%} of the losses",
}
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}, {rate_fmt}]"


@dataclass
class Reports:
    """The log, the trackers of the accelerator and, for a training that is watched, standard error.

    There a bar goes with the steps in a terminal; where it is none, one line is written for each epoch.
    """

    accelerator: Any
    log: RunLog
    backward: Backward
    tasks: tuple[str, ...]
    position: Position
    epochs: int
    steps: int
    watched: bool
    _bar: Any = None
    _lines: bool = False
    _known: dict[str, float] = field(default_factory=dict)
    _first_step: int = 0
    _started: float = 0.0
    _epoch_started: float = 0.0

    @contextlib.contextmanager
    def opened(self, tracked: tuple[str, Mapping[str, Any]] | None, resumed: bool) -> Iterator[None]:
        """Within, reports come: to trackers under the name and with the options of the run."""
        if tracked is not None:
            name, options = tracked
            # What a killed run has logged behind the checkpoint is taken out of the charts.
            purge = {"tensorboard": {"purge_step": self.position.step + 1}} if resumed else {}
            self.accelerator.init_trackers(name, dict(options), init_kwargs=purge)
        in_terminal = self.watched and sys.stderr.isatty()
        self._lines = self.watched and not in_terminal
        self._first_step = self.position.step
        self._started = self._epoch_started = time.monotonic()
        self._bar = need("tqdm").tqdm(
            total=self.steps, initial=self.position.step, unit="step", bar_format=_BAR, disable=not in_terminal
        )
        try:
            with self._bar:
                yield
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()  # not end_training(), which ends the process group, too

    def step(self) -> None:
        """One more optimizer step was taken."""
        self._bar.update()

    def interval(self, losses: list[float], rates: list[Any], gradient_norm: Any) -> None:
        """Some steps have these mean losses; the last of them had these learning rates."""
        values: dict[str, Any] = {"loss": dict(zip(self.tasks, losses)), "learning_rate": rates}
        if gradient_norm is not None:
            values["gradient_norm"] = float(gradient_norm)
        if (regularizer := self.backward.regularizer) is not None and regularizer.report is not None:
            values["penalty"] = float(regularizer.report.penalty)
        self._write("step", values)
        self._show({"training_loss": mean_of_known(losses)})

    def epoch(self, losses: list[float], figures: Mapping[str, Any]) -> None:
        """An epoch has these mean losses, and whatever else was measured at its end."""
        self._write("epoch", {"loss": dict(zip(self.tasks, losses)), **figures})
        known = {"training_loss": mean_of_known(losses), **figures}
        self._show(known)
        now = time.monotonic()
        if self._lines:
            per_step = (now - self._started) / max(self.position.step - self._first_step, 1)
            left = per_step * (self.steps - self.position.step)
            took = duration_text(now - self._epoch_started)
            line = f"epoch {self.position.epoch} of {self.epochs}: {_told(known)}, {took}"
            with contextlib.suppress(OSError):  # a terminal that was closed, a disk that is full
                print(f"{line}, {duration_text(left)} left" if left else line, file=sys.stderr, flush=True)
        self._epoch_started = now

    def _write(self, event: str, values: Mapping[str, Any]) -> None:
        self.log.write(event, {"epoch": self.position.epoch, "step": self.position.step, **values})
        if self.accelerator.trackers:
            self.accelerator.log(_flat(event, values), step=self.position.step)
            for part in self.backward.attached.values():
                if not isinstance(part, HeadPenalty) and part.report is not None:  # which has figures of its own
                    log_report(part, self.accelerator, self.position.step)

    def _show(self, figures: Mapping[str, Any]) -> None:
        self._known.update({name: value for name, value in figures.items() if name in _WORDS})
        text = _told(self._known).replace("validation ", "").replace(" of the losses", "")  # terminals are narrow
        self._bar.set_postfix_str(text, refresh=False)


def _told(figures: Mapping[str, Any]) -> str:
    told = []
    for name, words in _WORDS.items():
        value = figures.get(name)
        # A loss that is none any more is worth telling; another figure is unknown then.
        if value is not None and (name == "training_loss" or not math.isnan(value)):
            told.append(words.format(value).replace("%", " %"))
    return ", ".join(told)


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_flat(f"{prefix}/{name}", value))
        elif isinstance(value, (list, tuple)):
            found.update(_flat(f"{prefix}/{name}", {str(index): own for index, own in enumerate(value)}))
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[f"{prefix}/{name}"] = value
    return found
