"""Gradients of estimators, added up over optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...distributed import Ranks
from ...errors import CaptureError, NonFiniteError
from ...tasks import first_few
from ...torch_tools import StateModule, real_device, state_dtype
from .factors import GRAMIANS, cosines, task_factors, unit_rows


class EstimatorGradients(StateModule):
    """Adds up ``dL_t/dh_t.weight`` over the steps of a window.

    Their mean over the batches with labels of a task would differ by a factor per task, which rows of length 1 do not have.

    Args:
        tasks: T.
        like: the weight of one estimator, ``[E, D]``.

    Attributes:
        gradients: ``[T, E, D]``, float64, the sums.
        batches: ``[T]`` int64, the steps in which the gradient was not zero.
        steps: 0-dim int64.
    """

    gradients: Tensor
    batches: Tensor
    steps: Tensor
    any_values: ClassVar[tuple[str, ...]] = ("gradients",)

    def __init__(self, tasks: int, like: nn.Parameter) -> None:
        super().__init__()
        device = real_device() if like.is_meta else like.device
        sums = torch.zeros(tasks, *like.shape, dtype=state_dtype(device), device=device)
        self.register_buffer("gradients", sums)
        self.register_buffer("batches", torch.zeros(tasks, dtype=torch.int64, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def add(self, weights: Mapping[int, nn.Parameter]) -> None:
        """Add the gradients that these weights have now; ``None`` is that of an absent task."""
        device = next(iter(weights.values())).device
        if self.gradients.device != device:
            self.to(device)
        for task, weight in weights.items():
            if weight.grad is not None:
                self.gradients[task] += weight.grad.to(device)
                self.batches[task] += weight.grad.any().to(device)
        self._set_value("steps", self._value("steps") + 1)

    def begin_again(self) -> None:
        """Begin a new window."""
        self.gradients.zero_()
        self.batches.zero_()
        self._set_value("steps", 0)

    @torch.no_grad()
    def cosines(self, kept: Mapping[int, str], ranks: Ranks, compare: str, energy: float) -> tuple[list[int], Tensor]:
        """Return which of the tasks ``kept`` had gradients, and cosines of their factors ``[t, t]``, float64 on the CPU.

        Sums are those over all processes, which all get the same to the bit. Where gradients are averaged over them already,
        sums only grow, each by the same factor.

        Raises:
            NonFiniteError: gradients with NaN or infinity.
            CaptureError: no gradients.
        """
        sums = ranks.add(self.gradients.clone()) if ranks.size > 1 else self.gradients
        units = unit_rows(sums[list(kept)].flatten(2))
        finite = units.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            bad = [task for task, fine in zip(kept.values(), finite) if not fine]
            raise NonFiniteError(
                f"the accumulated gradients of {first_few(bad)} have NaN or infinity. Clip gradients or lower the learning "
                "rate, and build this anew."
            )
        present = units.flatten(1).any(1)
        if not bool(present.any()):
            raise CaptureError(
                "no gradients of the estimators were gathered yet. Build this with optimizer=optimizer, and call it after "
                "some steps of that, with labels of the tasks."
            )
        gramian = GRAMIANS[compare](units[present]).cpu().double()
        matrix = cosines(task_factors(gramian, energy)).to(units)
        return [task for task, there in zip(kept, present.tolist()) if there], ranks.from_first(matrix).cpu().double()
