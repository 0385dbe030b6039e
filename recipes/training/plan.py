"""How long and in which steps a training goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..runtime.errors import OptionError
from .learning_rate import DECAYS


@dataclass(frozen=True)
class Plan:
    """How long and in which steps a training goes.

    Attributes:
        epochs: how many.
        batch_size: samples of an optimizer step, of all processes and micro-batches together.
        seed: of the batches, of what is drawn for samples, and of what the model draws.
        accumulation: micro-batches of each step.
        clip_norm: largest norm of all gradients together.
        warmup_steps: over which the learning rate rises linearly.
        decay: of the learning rate after that: ``"constant"``, ``"cosine"`` or ``"linear"``, down to 0 with the last step.
        data_workers: processes that load data, for each process that trains.
        evaluation_batch_size: samples of a process that are predicted at once; all if ``None``.
        log_steps: steps between the lines of the log, beside one for each epoch; 0 for none.
        checkpoint_steps: steps between checkpoints; 0 for none but the one that SIGTERM asks for.
        keep_checkpoints: how many are kept.
        progress: tell what the training does, on the main process: by a bar in a terminal, or else by a line for each epoch.
    """

    epochs: int
    batch_size: int
    seed: int = 0
    accumulation: int = 1
    clip_norm: float | None = None
    warmup_steps: int = 0
    decay: str = "constant"
    data_workers: int = 0
    evaluation_batch_size: int | None = None
    log_steps: int = 0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    progress: bool = False

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "accumulation": 1, "keep_checkpoints": 1}
        for name in (*least, "warmup_steps", "data_workers", "log_steps", "checkpoint_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, 0):
                raise OptionError(f"{name} must be a whole number from {least.get(name, 0)} on, found {value!r}.")
        if self.evaluation_batch_size is not None and not (
            isinstance(self.evaluation_batch_size, int) and self.evaluation_batch_size > 0
        ):
            raise OptionError(
                f"evaluation_batch_size must be a whole number from 1 on, or None; found {self.evaluation_batch_size!r}."
            )
        if self.clip_norm is not None and not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise OptionError(f"clip_norm must be a finite number above 0, or None; found {self.clip_norm!r}.")
        if self.decay not in DECAYS:
            raise OptionError(f"found the decay {self.decay!r}. Use one of {', '.join(DECAYS)}.")
