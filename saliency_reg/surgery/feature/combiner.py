"""What the fork does with the gradients of the tasks: their Gramian, the weights, the weighted sum, and figures of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ...distributed import Ranks
from ...errors import ConfigurationError, SurgeryError
from ...report import SurgeryReport
from ...torch_tools import Gradient, StateModule, warn_user
from .. import Weighting, begin_anew, check_weighting, gramian_over, task_weights, weighted_sum


class TaskGradients(Protocol):
    """The gradients of single tasks at the tensors that the heads share, in one backward pass of this process."""

    @property
    def any_here(self) -> bool:
        """Whether a task has one."""

    def gramian(self) -> Tensor:
        """Return ``[T, T]`` inner products."""

    def weighted_sum(self, weights: Tensor, totals: Sequence[Gradient]) -> list[Gradient]:
        """Return one gradient for each tensor; ``totals`` are all that came through the heads, other outputs included."""

    def per_task(self) -> Sequence[Sequence[Gradient]]:
        """Return ``[tensor][task]``."""


@dataclass
class SeparateGradients:
    """Task gradients that arrive apart from each other: there is a head for each task."""

    gradients: Sequence[Sequence[Gradient]]  # [tensor][task]
    device: torch.device  # where their Gramian is added up

    @property
    def any_here(self) -> bool:
        return any(gradient is not None for own in self.gradients for gradient in own)

    def gramian(self) -> Tensor:
        return gramian_over(self.gradients, len(self.gradients[0]), self.device)

    def weighted_sum(self, weights: Tensor, totals: Sequence[Gradient]) -> list[Gradient]:
        return [
            total if all(one is None for one in own) else weighted_sum(own, weights)
            for own, total in zip(self.gradients, totals)
        ]

    def per_task(self) -> Sequence[Sequence[Gradient]]:
        return self.gradients


#: Training forwards without any gradient weighed after which the user is told.
FORWARDS = 100
_NEVER_WEIGHED = (
    f"surgery has weighed no gradient in {FORWARDS} training forwards: no backward pass has brought it gradients of task "
    "losses. It leaves backward passes with create_graph=True as they are, and those that stop before the feature map (a "
    "frozen backbone). Call loss.backward() without create_graph on losses of the heads' outputs, or leave surgery out."
)


class _Mode(Enum):
    COMBINE = "weigh the task gradients"
    PASS = "add them up, as without surgery"


class GradientCombiner(StateModule):
    """Weighs the gradients that the heads send back to the feature map they share, and keeps figures of that."""

    #: Forwards so far, until gradients are weighed or the user is told that they never were.
    _idle: int | None = 0
    in_a_copy: ClassVar[dict[str, Any]] = {"_report": None, "_task_gradients": None, "_mode": _Mode.COMBINE}

    def __init__(self, tasks: Sequence[str], weighting: Any, ranks: Ranks) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.weighting: Weighting = check_weighting(weighting, len(self.tasks))
        #: While false, gradients pass as without surgery.
        self.enabled = True
        #: Whether :attr:`task_gradients` are kept, which takes the memory of T gradients of the feature map.
        self.keep_task_gradients = False
        self.ranks = ranks
        self.ranks.prepare()  # here, where all processes are, if there are several already
        self.arrived = torch.zeros(len(self.tasks), dtype=torch.bool)
        self._mode = _Mode.COMBINE
        self._report: SurgeryReport | None = None
        self._task_gradients: dict[str, tuple[Tensor, ...]] | None = None

    @property
    def report(self) -> SurgeryReport | None:
        """Figures of the latest backward pass; ``None`` between a training forward and its backward."""
        return self._report

    @property
    def task_gradients(self) -> Mapping[str, tuple[Tensor, ...]]:
        """Gradient of each task with respect to the feature map, in the latest backward pass of this process.

        ``{task: (gradient, ...)}`` with one ``[B, ...]`` for each tensor that the heads share; with the user's loss weight
        and loss scale in it. Tasks without a loss in that pass are left out. Where a head reads the output of another one,
        what comes through both counts to the one next to the feature map.

        Raises:
            ConfigurationError: they are not kept.
            SurgeryError: no backward pass has reached the feature map since the latest training forward.
        """
        if not self.keep_task_gradients:
            raise ConfigurationError(
                "task gradients are not kept. Set .keep_task_gradients = True before the backward pass."
            )
        if self._task_gradients is None:
            raise SurgeryError(
                "no backward pass has reached the feature map since the latest training forward. Call loss.backward() first."
            )
        return self._task_gradients

    def change_tasks(self, tasks: Sequence[str]) -> None:
        """Weigh the gradients of other tasks from the next forward on; a weighting with state, for which see
        :func:`task_weights`, is begun anew.
        """
        self.tasks = tuple(tasks)
        self.arrived = torch.zeros(len(self.tasks), dtype=torch.bool)
        self._report = self._task_gradients = None
        begin_anew(self.weighting)

    def passing(self) -> AbstractContextManager[None]:
        """Let gradients pass through the fork unchanged: for measurements of reach and sample mixing, or of single tasks."""
        return self._in_mode(_Mode.PASS)

    @contextmanager
    def _in_mode(self, mode: _Mode) -> Iterator[None]:
        before, self._mode = self._mode, mode
        try:
            yield
        finally:
            self._mode = before

    # What the fork asks.

    def forward_begins(self) -> None:
        """Forget the latest backward pass. All processes are here: the backward of one may not reach the fork."""
        self._report = self._task_gradients = None
        self.ranks.prepare()
        if self._idle is not None and self.enabled:
            self._idle += 1
            if self._idle > FORWARDS:
                self._idle = None
                warn_user(_NEVER_WEIGHED)

    @property
    def combines(self) -> bool:
        """Whether gradients that arrive now are weighed."""
        return self.enabled and self._mode is _Mode.COMBINE

    def combine(self, gradients: TaskGradients, totals: Sequence[Gradient]) -> list[Gradient] | None:
        """Return one gradient for each tensor, of the ``totals`` there; ``None`` if no process has a task gradient."""
        if not gradients.any_here and self.ranks.size == 1:
            return None
        gramian = gradients.gramian()
        if len(gramian) != len(self.tasks):
            raise SurgeryError(
                f"this backward pass is of a forward with {len(gramian)} tasks, and there are {len(self.tasks)} now. Add "
                "and remove tasks between the optimizer step and the next forward."
            )
        self.arrived = gramian.diagonal() != 0  # also where it is NaN
        # Processes hold different samples, and their gradients are averaged: each product counts 1/N^2.
        gramian = self.ranks.add(gramian.clone()) / self.ranks.size**2
        if self.ranks.size > 1 and not bool(gramian.any()):
            return None
        self._idle = None
        weights = task_weights(self.weighting, gramian, self.ranks)
        self._report = SurgeryReport.of(self.tasks, gramian, weights)
        if self.keep_task_gradients:
            self._task_gradients = {}
            for name, own in zip(self.tasks, zip(*gradients.per_task())):
                if found := tuple(gradient for gradient in own if gradient is not None):
                    self._task_gradients[name] = found
        return gradients.weighted_sum(weights, totals)
