"""A loop that combines the task gradients at the parameters, by a ``ParameterSurgery`` or by hand, against a reference."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..regularizer import SaliencyRegularizer
from ..surgery import PCGrad, check_weighting, task_weights
from ..surgery.parameters import ParameterSurgery
from ..torch_tools import Gradient, added, gradients_of
from .subject import Subject
from .unchanged import lent

#: So many orders of PCGrad are tried for a loop that draws its own.
_MOST_ORDERS = 1296


@dataclass
class ParameterLevel:
    """What a loop of one's own is compared with."""

    weighting: Any
    surgery: ParameterSurgery | None = None  # that the loop uses, or that was passed


def lent_to_a_loop(surgery: ParameterSurgery | None) -> contextlib.AbstractContextManager[None]:
    """Let a loop use it, and put it back; gradients are measured in this step."""
    if surgery is None:
        return contextlib.nullcontext()
    weighting = copy.deepcopy(surgery.weighting)
    usable = (check_weighting(weighting, None),)
    return lent(surgery, _has_weights=False, _unfinished=None, weighting=weighting, _usable=usable)


def held_by(function: Any, kind: type) -> list[Any]:
    """Return the objects of a kind that a function closes over, is bound to, or names as globals."""
    found: list[Any] = []
    while isinstance(function, functools.partial):
        found += [*function.args, *function.keywords.values()]
        function = function.func
    owner = getattr(function, "__self__", None)
    found += [owner, *getattr(owner, "__dict__", {}).values(), *(getattr(function, "__defaults__", None) or ())]
    with contextlib.suppress(TypeError, ValueError):  # no function of Python; a name that has no value yet
        names = inspect.getclosurevars(function)
        found += [*names.nonlocals.values(), *names.globals.values()]
    return list({id(one): one for one in found if isinstance(one, kind)}.values())


def level_of(chosen: Any, regularizer: SaliencyRegularizer | None, backward: Any) -> ParameterLevel | None:
    """Return what the loop is to be compared with at the parameters, or ``None`` for the surgery of the regularizer."""
    if isinstance(chosen, ParameterSurgery):
        return ParameterLevel(chosen._usable[0], chosen)
    if chosen is None or backward is None or (regularizer is not None and regularizer.surgery is not None):
        return None
    used = next(iter(held_by(backward, ParameterSurgery)), None)
    if used is not None:
        same = isinstance(chosen, PCGrad) and isinstance(used.weighting, PCGrad)
        return ParameterLevel(used._usable[0] if same else check_weighting(chosen, None), used)
    return None if regularizer is None else ParameterLevel(check_weighting(chosen, None))


@dataclass
class TaskGradients:
    """The gradients of each task, and of the penalty, at all trained parameters."""

    names: list[str]
    tasks: list[list[Gradient]]  # of each task that has a loss
    penalty: list[Gradient]

    def reached(self, place: int) -> int:
        """Return how many tasks depend on a parameter."""
        return sum(rows[place] is not None for rows in self.tasks)

    def combined(self, weights: Tensor, shared: set[str], *, penalty: bool = True) -> dict[str, Gradient]:
        """Return the weighted sum at shared parameters and the plain one at others, with the penalty's gradient."""
        found: dict[str, Gradient] = {}
        for place, name in enumerate(self.names):
            used = weights.tolist() if name in shared else [1.0] * len(self.tasks)
            rows = [rows[place] for rows in self.tasks]
            parts = [None if row is None else weight * row for weight, row in zip(used, rows)]
            found[name] = added(*parts, self.penalty[place] if penalty else None)
        return found

    def gramian(self, measured: set[str]) -> Tensor:
        """Return ``[T, T]`` inner products at these parameters."""
        at = [place for place, name in enumerate(self.names) if name in measured]
        total = torch.zeros(len(self.tasks), len(self.tasks), dtype=torch.float64)
        for place in at:
            own = [row[place] for row in self.tasks]
            size = next(one.numel() for one in own if one is not None)
            zero = torch.zeros(size, dtype=torch.float64)
            flat = torch.stack([zero if one is None else one.detach().cpu().double().flatten() for one in own])
            total += flat @ flat.T
        return total


def task_gradients(subject: Subject, named: list[tuple[str, nn.Parameter]]) -> TaskGradients:
    """Differentiate each task's loss, and the penalty, by itself."""
    run = subject.run()
    penalty, parameters = subject.penalty(run), [one for _, one in named]
    with torch.enable_grad():
        losses = [loss.mean() for _, loss in sorted(subject.losses_of(run).items())]
    rows = [list(gradients_of([loss], parameters)) for loss in losses]
    alone = gradients_of([penalty], parameters) if penalty.requires_grad else [None] * len(parameters)
    return TaskGradients([name for name, _ in named], rows, list(alone))


def shared_names(gradients: TaskGradients, surgery: ParameterSurgery | None) -> tuple[set[str], set[str]]:
    """Return the shared parameters, and those at which inner products are taken."""
    chosen = None if surgery is None else surgery._shared
    reached = {name: gradients.reached(place) for place, name in enumerate(gradients.names)}
    shared = {name for name, tasks in reached.items() if tasks > 1 or (chosen is not None and name in chosen and tasks)}
    shared &= shared if chosen is None else set(chosen)
    measured = None if surgery is None else surgery._measured
    return shared, shared if measured is None else shared & set(measured)


def possible_weights(level: ParameterLevel, gramian: Tensor) -> list[Tensor]:
    """Return the weights ``[T]``, and those of other orders, in which a loop by hand may project."""
    size = len(gramian)
    if size < 2:
        return [torch.ones(size, dtype=torch.float64)]
    values, vectors = torch.linalg.eigh(gramian)
    rows = vectors * values.clamp(min=0).sqrt()  # which have these inner products
    found = [weights_of(level.weighting, rows)]
    by_hand = isinstance(level.weighting, PCGrad) and level.surgery is None
    if by_hand and math.factorial(size - 1) ** size <= _MOST_ORDERS:
        ways = [list(itertools.permutations([one for one in range(size) if one != task])) for task in range(size)]
        found += [_pcgrad(rows, torch.tensor(order)) for order in itertools.product(*ways)]
    return found


def weights_of(weighting: Any, gradients: Tensor) -> Tensor:
    """Return the weights ``[T]`` of the task gradients ``[T, N]``; the weighting keeps its state."""
    twin = copy.deepcopy(weighting)
    if isinstance(twin, PCGrad):
        return _pcgrad(gradients, PCGrad.order(twin, len(gradients)))
    with torch.no_grad():
        return task_weights(twin, gradients @ gradients.T, Ranks("local"))


def _pcgrad(gradients: Tensor, order: Tensor) -> Tensor:
    """Algorithm 1 of Yu et al. on the gradients ``[T, N]`` themselves; the weights of their sum, ``[T]``."""
    weights = torch.ones(len(gradients), dtype=gradients.dtype, device=gradients.device)
    for task, others in enumerate(order.tolist()):
        projected = gradients[task].clone()
        for other in others:
            product = projected @ gradients[other]
            if product < 0:
                share = product / (gradients[other] @ gradients[other])
                projected -= share * gradients[other]
                weights[other] -= share
    return weights
