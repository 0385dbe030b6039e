"""What may be grouped: names, affinities, and groups that others made."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from ...errors import ConfigurationError, NonFiniteError, ShapeError, TaskError, WrongTypeError
from ...tasks import check_task_names, first_few

#: Differences that single precision makes, which are not worth an error.
_ROUNDING = 1e-5


def square(values: object, what: str) -> Tensor:
    """Return a matrix ``[T, T]`` as float64 on the CPU, detached."""
    try:
        matrix = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongTypeError(
            f"{what} must be a [T, T] tensor of numbers, found {type(values).__name__}. "
            "Pass torch.as_tensor(frame.values) for a table."
        ) from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"{what} must have the shape [T, T], found {list(matrix.shape)}.")
    return matrix


def names_for(tasks: Sequence[str] | None, size: int, *, at_least: int = 3) -> list[str]:
    """Return the names of ``size`` tasks: those given, or their numbers."""
    if size < at_least:
        raise TaskError(
            f"found {size} task(s); grouping needs at least {at_least}: with fewer there is nothing to choose."
        )
    if tasks is None:
        return [str(number) for number in range(size)]
    names = check_task_names(tasks)
    if len(names) != size:
        raise TaskError(f"found {len(names)} task names for a matrix of {size} tasks. Pass one name per row.")
    return names


def check_known(matrix: Tensor, names: Sequence[str], what: str, *, diagonal: bool) -> None:
    """Raise an error that names the pairs of which nothing is known (NaN) or that are infinite."""
    unknown = ~matrix.isfinite()
    if not diagonal:
        unknown = unknown & ~torch.eye(len(matrix), dtype=torch.bool, device="cpu")
    if found := _pairs(unknown, names):
        raise NonFiniteError(
            f"{what} has no finite value for {first_few(found)}. Leave out tasks that were never seen together, "
            "or fill in the values that such pairs shall count with."
        )


def check_affinity(affinity: object, names: Sequence[str] | None = None, what: str = "affinity") -> Tensor:
    """Return an affinity ``[T, T]``, symmetric and in [0, 1], as float64 on the CPU; rounding is forgiven."""
    matrix = square(affinity, what)
    names = list(names) if names is not None else [str(number) for number in range(len(matrix))]
    check_known(matrix, names, what, diagonal=True)
    if found := _pairs((matrix < -_ROUNDING) | (matrix > 1 + _ROUNDING), names):
        raise ConfigurationError(
            f"{what} must be in [0, 1], larger for closer tasks; found {matrix.min():.4g} to {matrix.max():.4g}, "
            f"outside for {first_few(found)}. Pass 1 - D / D.max() for distances, (1 + C) / 2 for cosines or correlations."
        )
    if found := _pairs(((matrix - matrix.T).abs() > _ROUNDING).triu(), names):
        raise ConfigurationError(f"{what} must be symmetric; it is not for {first_few(found)}. Pass (A + A.T) / 2.")
    return ((matrix + matrix.T) / 2).clamp(0.0, 1.0)


def check_number(groups: int, tasks: int) -> int:
    """Return a number of groups from 1 to the number of tasks."""
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise WrongTypeError(f"groups must be a whole number, found {groups!r}.")
    if not 1 <= groups <= tasks:
        raise ConfigurationError(f"groups must be from 1 to the number of tasks, {tasks}; found {groups}.")
    return groups


def check_grouping(
    groups: Iterable[Collection[str]], tasks: Sequence[str], *, overlap: bool = False
) -> tuple[tuple[str, ...], ...]:
    """Check groups of tasks and return them as tuples of names, the names of each in the order of the tasks.

    Args:
        groups: collections of task names; what :func:`task_groups` returns, ``.groups`` of :func:`best_groups`, or your own.
        tasks: the names of all tasks.
        overlap: whether a task may be in several groups.

    Raises:
        TaskError: a group is empty, names something that is not a task, or a task twice; a task is in no group; or in
            several, without ``overlap``.
        WrongTypeError: ``groups`` is not a collection of collections of names.

    >>> from saliency_reg import check_grouping
    >>> check_grouping([["depth", "normals"], {"edges"}], tasks=["depth", "edges", "normals"])
    (('depth', 'normals'), ('edges',))
    """
    names = check_task_names(tasks)
    if isinstance(groups, str) or not isinstance(groups, Iterable):
        raise WrongTypeError(f"groups must be a list of lists of task names, found {type(groups).__name__}.")
    checked = []
    for group in groups:
        if isinstance(group, str) or not isinstance(group, Collection):
            raise WrongTypeError(
                f"a group must be a list of task names, found {group!r}. Pass [{group!r}] for a single task."
            )
        members = list(group)
        if not members:
            raise TaskError("found a group without tasks. Leave it out.")
        if unknown := [member for member in members if member not in names]:
            raise TaskError(f"the group {members} names {unknown}, which are not tasks. The tasks are {names}.")
        if len(set(members)) < len(members):
            raise TaskError(f"the group {members} names a task twice.")
        checked.append(tuple(name for name in names if name in members))
    everyone = [member for group in checked for member in group]
    if missing := [name for name in names if name not in everyone]:
        raise TaskError(f"no group has the tasks {missing}. Add them to a group, or as groups of their own.")
    if not overlap and (several := [name for name in names if everyone.count(name) > 1]):
        raise TaskError(
            f"the tasks {several} are in several groups; here each task belongs to one. Choose one for each."
        )
    if len(set(checked)) < len(checked):
        raise TaskError(f"the same group occurs twice in {checked}. Leave one out.")
    return tuple(checked)


def _pairs(where: Tensor, names: Sequence[str]) -> list[str]:
    """Return the pairs at which a ``[T, T]`` mask is true, each once, as text."""
    found = {(min(i, j), max(i, j)) for i, j in where.nonzero().tolist()}
    return [f"({names[i]}, {names[j]})" for i, j in sorted(found)]
