"""A loop that combines the task gradients at the parameters, by a ``ParameterSurgery`` or by hand, against a reference."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import Ranks
from ..regularizer import SaliencyRegularizer
from ..surgery import PCGrad, check_weighting, task_weights
from ..surgery.parameters import ParameterSurgery
from ..torch_tools import Gradient, gradients_of
from .subject import Run, Subject
from .unchanged import unchanged

#: So many orders of PCGrad are tried for a loop that draws its own.
_MOST_ORDERS = 1296


@dataclass
class ParameterLevel:
    """What a loop of one's own is compared with."""

    weighting: Any
    surgery: ParameterSurgery | None = None  # that the loop uses, or that was passed

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Let the loop use it, and put it back; gradients are measured in this step."""
        if self.surgery is None:
            yield
            return
        with unchanged(self.surgery):
            self.surgery._has_weights, self.surgery._unfinished = False, None
            self.surgery.ranks = Ranks("local")
            yield


def held_by(function: Any, kind: type) -> list[Any]:
    """Return the objects of a kind that a function closes over, is bound to, or names as globals."""
    if isinstance(function, functools.partial):
        return [
            *[one for one in (*function.args, *function.keywords.values()) if isinstance(one, kind)],
            *held_by(function.func, kind),
        ]
    found = [getattr(function, "__self__", None)]
    inner = getattr(function, "__func__", function)
    for cell in getattr(inner, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # of a name that has no value yet
            found.append(cell.cell_contents)
    code, known = getattr(inner, "__code__", None), getattr(inner, "__globals__", {})
    found += [known[name] for name in (code.co_names if code is not None else ()) if name in known]
    found += [*(getattr(inner, "__defaults__", None) or ())]
    owner = found[0]
    found += [*vars(owner).values()] if owner is not None and hasattr(owner, "__dict__") else []
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
        return sum(rows[place] is not None for rows in self.tasks)

    def combined(self, weights: Tensor, shared: set[str], *, penalty: bool = True) -> dict[str, Gradient]:
        """Return the weighted sum at shared parameters and the plain one at others, with the penalty's gradient."""
        found: dict[str, Gradient] = {}
        for place, name in enumerate(self.names):
            used = weights.tolist() if name in shared else [1.0] * len(self.tasks)
            rows = [rows[place] for rows in self.tasks]
            parts = [weight * row for weight, row in zip(used, rows) if row is not None]
            own = self.penalty[place]
            parts += [own] if own is not None and penalty else []
            found[name] = sum(parts[1:], start=parts[0]) if parts else None
        return found

    def gramian(self, measured: set[str]) -> Tensor:
        flat = torch.stack([self.flat(rows, measured) for rows in self.tasks])
        return flat @ flat.T

    def flat(self, rows: list[Gradient], names: set[str]) -> Tensor:
        at = [place for place, name in enumerate(self.names) if name in names]
        sizes = {place: next(one for row in self.tasks if (one := row[place]) is not None) for place in at}
        parts = [torch.zeros_like(sizes[place]) if (one := rows[place]) is None else one for place in at]
        return torch.cat([part.detach().double().flatten() for part in parts]) if parts else torch.zeros(1).double()


def task_gradients(subject: Subject, named: list[tuple[str, nn.Parameter]]) -> TaskGradients:
    """Differentiate each task's loss, and the penalty, by itself."""
    run = subject.run()
    penalty, parameters = subject.penalty(run), [one for _, one in named]
    rows = []
    for _, loss in sorted(_losses(subject, run).items()):
        rows.append(list(gradients_of([loss], parameters)))
    alone: list[Gradient] = (
        list(gradients_of([penalty], parameters)) if penalty.requires_grad else [None] * len(parameters)
    )
    return TaskGradients([name for name, _ in named], rows, alone)


def _losses(subject: Subject, run: Run) -> dict[int, Tensor]:
    with torch.enable_grad():
        return {task: loss.mean() for task, loss in subject.losses_of(run).items()}


def shared_names(gradients: TaskGradients, surgery: ParameterSurgery | None) -> tuple[set[str], set[str]]:
    """Return the shared parameters, and those at which inner products are taken."""
    chosen = None if surgery is None else surgery._shared
    reached = {name: gradients.reached(place) for place, name in enumerate(gradients.names)}
    shared = {name for name, tasks in reached.items() if tasks > 1 or (chosen is not None and name in chosen and tasks)}
    shared &= shared if chosen is None else set(chosen)
    measured = None if surgery is None else surgery._measured
    return shared, shared if measured is None else shared & set(measured)


def weights_of(
    level: ParameterLevel, gramian: Tensor, pcgrad: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the weights, and those of other orders, in which a loop by hand may project."""
    if len(gramian) < 2:
        return torch.ones(len(gramian), dtype=torch.float64), []
    weighting = copy.deepcopy(level.weighting)
    if not isinstance(weighting, PCGrad):
        with torch.no_grad():
            return task_weights(weighting, gramian, Ranks("local")), []
    rows = _root(gramian)
    drawn = pcgrad(rows, PCGrad.order(weighting, len(gramian)))
    others: list[Tensor] = []
    size = len(gramian)
    if level.surgery is None and math.factorial(size - 1) ** size <= _MOST_ORDERS:
        ways = [list(itertools.permutations([one for one in range(size) if one != task])) for task in range(size)]
        others = [pcgrad(rows, torch.tensor(order)) for order in itertools.product(*ways)]
    return drawn, others


def _root(gramian: Tensor) -> Tensor:
    """Return vectors that have these inner products."""
    values, vectors = torch.linalg.eigh(gramian)
    rows: Tensor = vectors * values.clamp(min=0).sqrt()
    return rows
