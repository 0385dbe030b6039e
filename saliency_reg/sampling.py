"""A sample of tasks for each step, where there are too many for all pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigurationError, WrongTypeError
from .state import StateModule

__all__ = ["TaskSampler"]


class TaskSampler(StateModule):
    """Draws ``most`` tasks per call, all subsets alike, as a function of the seed and the number of the call.

    Sampling tasks and not pairs keeps both the saliencies and the distances small. Every pair is drawn with the same
    probability, and the factor that is returned makes the penalty unbiased.

    Args:
        most: tasks per call, at least 2, or ``None`` for all.
        seed: of the generator of its own; the global one is left alone.
    """

    calls: Tensor

    def __init__(self, most: int | None, seed: int) -> None:
        super().__init__()
        for name, value in (("max_tasks_per_step", most), ("seed", seed)):
            if isinstance(value, bool) or not (value is None or isinstance(value, int)):
                raise WrongTypeError(f"{name} must be an int, found {type(value).__name__}.")
        if most is not None and most < 2:
            raise ConfigurationError(
                f"max_tasks_per_step must be at least 2, found {most}: a distance needs two tasks."
            )
        self.most = most
        self.seed = seed
        self._calls = 0
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def choose(self, tasks: Sequence[int]) -> tuple[list[int] | None, float]:
        """Return the chosen tasks in order (``None`` for all) and the factor of their penalty."""
        if self.most is None or len(tasks) <= self.most:
            return None, 1.0
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._calls) % 2**63)
        self._calls += 1
        self.calls.fill_(self._calls)
        order = torch.randperm(len(tasks), generator=generator, device="cpu")[: self.most]
        factor = len(tasks) * (len(tasks) - 1) / (self.most * (self.most - 1))
        return sorted(tasks[index] for index in order.tolist()), factor

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._calls = int(self.calls)
