"""How strong the penalty is in each optimizer step."""

from __future__ import annotations

from ..errors import ConfigurationError, WrongTypeError
from ..relations.weights import non_negative_number

__all__ = ["StrengthSchedule"]


class StrengthSchedule:
    """Zero for ``start_step`` optimizer steps, then a linear rise over ``warmup_steps``, then ``strength``.

    Raises:
        ConfigurationError: a negative or non-finite number.
        WrongTypeError: no number, or a step count that is no int.
    """

    def __init__(self, strength: float, warmup_steps: int, start_step: int) -> None:
        self.strength = non_negative_number("strength", strength)
        self.warmup_steps = _step_count("warmup_steps", warmup_steps)
        self.start_step = _step_count("start_step", start_step)

    def at(self, step: int) -> float:
        """The strength in the optimizer step after ``step`` others."""
        since_start = step - self.start_step
        if since_start < 0:
            return 0.0
        return self.strength * min(1.0, (since_start + 1) / max(self.warmup_steps, 1))


def _step_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongTypeError(f"{name} must be an int, found {type(value).__name__}.")
    if value < 0:
        raise ConfigurationError(f"{name} must be >= 0, found {value}.")
    return value
