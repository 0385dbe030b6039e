"""Values that a user gives for each task: names, losses, labels, as a mapping or a sequence in the order of the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union

import torch
from torch import Tensor

from .errors import TaskError, WrongTypeError

_Value = TypeVar("_Value")
#: ``{task: loss}``, or a loss for each task in their order.
Losses = Union[Mapping[str, Tensor], Sequence[Tensor]]


def check_task_names(tasks: Sequence[str]) -> list[str]:
    """Return at least two names, all different."""
    if isinstance(tasks, str) or not isinstance(tasks, Sequence):
        raise WrongTypeError(f"tasks must be a list of names, found {type(tasks).__name__}. Pass tasks=['a', 'b'].")
    names = [str(task) for task in tasks]
    if len(names) < 2:
        raise TaskError(f"found {len(names)} task(s) {names}; relations between tasks need at least 2.")
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise TaskError(f"the task names {duplicates} occur more than once. Give each task a name of its own.")
    return names


def names_of(values: Any, what: str, advice: str = "") -> list[str]:
    """Return the keys of a mapping, or the numbers of a sequence, as task names."""
    if isinstance(values, Mapping):
        return [str(name) for name in values]
    _check_sequence(values, what, advice)
    return [str(number) for number in range(len(values))]


def per_task(
    values: Mapping[str, _Value] | Sequence[_Value], tasks: Sequence[str], what: str, advice: str = ""
) -> dict[int, _Value]:
    """Return ``{task number: value}`` in the order of the tasks. A mapping may leave tasks out, a sequence may not.

    ``what`` names the argument in errors, ``advice`` is what they end in.
    """
    if isinstance(values, Mapping):
        if unknown := [name for name in values if name not in tasks]:
            raise TaskError(
                f"{what} names {unknown}, which are not tasks. The tasks are {list(tasks)}. {advice}".rstrip()
            )
        return {index: values[task] for index, task in enumerate(tasks) if task in values}
    _check_sequence(values, what, advice)
    if len(values) != len(tasks):
        raise TaskError(
            f"{what} has {len(values)} entries for {len(tasks)} tasks. Pass one for each task, or a mapping."
        )
    return dict(enumerate(values))


def sum_of_losses(losses: Losses | Tensor | None, tasks: Sequence[str], device: torch.device) -> Tensor | None:
    """Return the sum of the task losses, detached; a 0-dim tensor is that sum.

    Per-sample losses count with their mean.
    """
    if losses is None:
        return None
    if isinstance(losses, Mapping) and not losses:  # a batch without any label
        return torch.zeros((), device=device)
    if isinstance(losses, Tensor) and losses.ndim == 0:
        return _precise(losses).to(device)
    found = losses_per_task(losses, tasks).values()
    means = [_precise(torch.as_tensor(loss)).mean().to(device) for loss in found]
    return torch.stack(means).sum() if means else None


def _precise(loss: Tensor) -> Tensor:
    return loss.detach() if loss.dtype == torch.float64 else loss.detach().float()


def losses_per_task(losses: Losses | Tensor, tasks: Sequence[str]) -> dict[int, Tensor]:
    """Return ``{task number: loss}``, with advice for whoever gave one tensor that holds them all."""
    advice = "Pass losses.unbind() for [T], losses.unbind(1) for [B, T]." if isinstance(losses, Tensor) else ""
    return per_task(losses, tasks, "losses", advice)  # type: ignore[arg-type]  # one tensor is refused


def spread(matrix: Tensor, present: Sequence[int], size: int, elsewhere: float) -> Tensor:
    """Return a matrix ``[t, t]`` among the tasks ``present``, or a vector ``[t]``, as one of all T."""
    if len(present) == size:
        return matrix
    full = torch.full((size,) * matrix.ndim, elsewhere, dtype=matrix.dtype, device=matrix.device)
    index = torch.tensor(list(present), dtype=torch.int64, device=matrix.device)
    full[index if matrix.ndim == 1 else (index.unsqueeze(1), index)] = matrix
    return full


def places_in(tasks: Sequence[int], some: Sequence[int]) -> list[int]:
    """Return where some of the tasks are among them."""
    place = {task: index for index, task in enumerate(tasks)}
    return [place[task] for task in some]


def first_few(names: Sequence[str], most: int = 6) -> str:
    """Return the first names and the last, for a line of text."""
    return ", ".join(names[:most]) + (f", ... {names[-1]}" if len(names) > most else "")


def _check_sequence(values: object, what: str, advice: str) -> None:
    if isinstance(values, (Tensor, str)) or not isinstance(values, Sequence):
        found = f"one tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise WrongTypeError(
            f"{what} must be a mapping or a sequence with an entry per task, found {found}. {advice}".rstrip()
        )
