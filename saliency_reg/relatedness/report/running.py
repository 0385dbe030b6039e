"""What is kept of the batches so far: sums that forget, with their normalisers, and the views at points of the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ...torch_tools import StateModule, real_device, state_dtype
from ..views import VIEWS

#: Sums ``[T, T]`` or ``[T]`` by name; the second is what the first is divided by.
_PAIRS = {"distance": "distance_weight", "cosine": "cosine_weight", "gain": "gain_weight"}
_ERRORS = ("both_hard", "both_easy", "one_hard")
_TASKS = ("margins", "losses", "labelled")


class RunningSums(StateModule):
    """Exponential sums ``s <- decay s + new``, with normalisers that forget alike: their ratios are means without a bias.

    ``both_hard``, ``both_easy`` and ``one_hard`` ``[T, T]`` count samples with labels of both tasks; in the last one, the
    task of the row is hard alone. ``margins`` and ``losses`` ``[T]`` are sums over ``labelled`` samples.
    """

    any_values: ClassVar[tuple[str, ...]] = ("cosine", "gain", "losses")

    def __init__(self, tasks: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        device = real_device()
        for name in (*_PAIRS, *_PAIRS.values(), *_ERRORS):
            self.register_buffer(name, torch.zeros(tasks, tasks, dtype=state_dtype(device), device=device))
        for name in _TASKS:
            self.register_buffer(name, torch.zeros(tasks, dtype=state_dtype(device), device=device))

    def add(self, **new: Tensor) -> None:
        """Let sums forget, and add to them."""
        for name, value in new.items():
            buffer = self._buffers[name]
            assert buffer is not None
            buffer.mul_(self.decay).add_(value)

    def add_mean(self, name: str, values: Tensor) -> None:
        """Add values ``[T, T]`` to a mean; those that are not finite are left out."""
        known = values.isfinite()
        self.add(**{name: torch.where(known, values, 0.0), _PAIRS[name]: known.to(values.dtype)})

    def mean(self, name: str) -> Tensor:
        """Return ``[T, T]``, NaN where nothing came."""
        return _ratio(self._sum(name), self._sum(_PAIRS[name]))

    def thresholds(self) -> Tensor:
        """Return ``[T]``, the mean margin so far; NaN for a task without any."""
        return _ratio(self._sum("margins"), self._sum("labelled"))

    def mean_losses(self) -> Tensor:
        return _ratio(self._sum("losses"), self._sum("labelled"))

    def agreement(self) -> tuple[Tensor, Tensor]:
        """Return ``[T, T]`` twice: how often tasks are hard or easy together, and the same corrected for chance (kappa)."""
        hard, easy, one = (self._sum(name) for name in _ERRORS)
        number = hard + easy + one + one.T
        together = _ratio(hard + easy, number)
        row, column = _ratio(hard + one, number), _ratio(hard + one.T, number)
        chance = row * column + (1 - row) * (1 - column)
        kappa = torch.where(chance < 1 - 1e-12, (together - chance) / (1 - chance), torch.nan)
        itself = torch.eye(len(hard), dtype=torch.bool, device=hard.device) & (number > 0)
        return together, torch.where(itself, 1.0, kappa)

    def _sum(self, name: str) -> Tensor:
        found = self._buffers[name]
        assert found is not None
        return found


class Trajectory(StateModule):
    """The views at points of the training that stay evenly spread: when all places are taken, every second one is given up.

    ``kept`` is ``[S, V, T, T]``, in the order of :data:`VIEWS`.
    """

    any_values: ClassVar[tuple[str, ...]] = ("kept",)
    kept: Tensor
    updates: Tensor
    stride: Tensor
    taken: Tensor

    def __init__(self, tasks: int, most: int) -> None:
        super().__init__()
        device = real_device()
        places = min(most, _ENTRIES // (len(VIEWS) * tasks**2)) // 2 * 2
        shape = places, len(VIEWS), tasks, tasks
        self.register_buffer("kept", torch.zeros(shape, dtype=state_dtype(device), device=device))
        for name, value in {"updates": 0, "stride": 1, "taken": 0}.items():
            self.register_buffer(name, torch.tensor(value, device=device))

    @property
    def number(self) -> int:
        """Updates so far."""
        return int(self._value("updates"))

    def note(self, views: Callable[[], Tensor]) -> None:
        """Count an update, and keep the views after it if it is one of the points."""
        updates, stride, taken = (self._value(name) for name in ("updates", "stride", "taken"))
        self._set_value("updates", updates + 1)
        if not len(self.kept) or (updates + 1) % stride:
            return
        if taken == len(self.kept):
            taken //= 2
            self.kept[:taken] = self.kept[1::2].clone()
            self._set_value("taken", taken)
            self._set_value("stride", 2 * stride)
            if (updates + 1) % (2 * stride):
                return
        self.kept[taken] = views()
        self._set_value("taken", taken + 1)

    def points(self) -> Tensor:
        """Return ``[S, V, T, T]``."""
        return self.kept[: self._value("taken")]


#: Of all points together.
_ENTRIES = 2**22


def _ratio(total: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight > 0, total / weight, torch.nan)
