"""The factor of the learning rate in the course of a training."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..runtime.errors import OptionError

DECAYS = ("constant", "cosine", "linear")


def learning_rate_factor(decay: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """From the number of steps taken to a factor: a linear rise, then constant, or down to 0 by a line or half a cosine.

    Raises:
        OptionError: an unknown decay, or a warm-up that takes the whole training.
    """
    if decay not in DECAYS:
        raise OptionError(f"found the decay {decay!r}. Use one of {', '.join(DECAYS)}.")
    if warmup_steps < 0 or (warmup_steps >= total_steps and warmup_steps > 0):
        raise OptionError(
            f"found {warmup_steps} warm-up steps in a training of {total_steps}. Pass a number from 0 to {total_steps - 1}."
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        if decay == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 - done if decay == "linear" else 1.0

    return factor
