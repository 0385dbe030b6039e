"""A sample of tasks for each step, where there are too many for all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ConfigurationError
from ..torch_tools import SeededModule, whole_number


class TaskSampler(SeededModule):
    """Draws at most ``most`` tasks per call, all subsets alike, as a function of the seed and the number of the call.

    Sampling tasks and not pairs keeps both the saliencies and the distances small. Every pair is drawn with the same
    probability, and the factor that is returned makes the penalty unbiased.
    """

    def __init__(self, most: int | None, seed: int) -> None:
        super().__init__(seed)
        self.most = None if most is None else whole_number("max_tasks_per_step", most)
        if self.most is not None and self.most < 2:
            raise ConfigurationError(
                f"max_tasks_per_step must be at least 2, found {most}: a distance needs two tasks."
            )

    def choose(self, tasks: Sequence[int]) -> tuple[list[int] | None, float]:
        """Return the chosen tasks in order (``None`` for all) and the factor of their penalty."""
        if self.most is None or len(tasks) <= self.most:
            return None, 1.0
        order = torch.randperm(len(tasks), generator=self.next_generator(), device="cpu")[: self.most]
        factor = len(tasks) * (len(tasks) - 1) / (self.most * (self.most - 1))
        return sorted(tasks[index] for index in order.tolist()), factor
