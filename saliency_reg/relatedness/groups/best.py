"""The best set of groups by TAG's objective (Fifty et al., NeurIPS 2021, arXiv 2109.04617), exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigurationError, NonFiniteError, ShapeError, WrongTypeError
from .checks import check_known, check_number, names_for, square

#: 3^12 steps take about a second; each task more takes three times as long.
MOST_TASKS = 12


@dataclass(frozen=True)
class GroupSelection:
    """Groups of tasks to train together, and from which of them each task is read.

    Attributes:
        groups: names of the tasks of each group, in the order of the tasks. A task may be in several.
        assignment: ``{task: its group}``; in other groups the task only helps.
        gains: ``{task: mean gain from the others in that group}``.
        score: mean of those over the tasks.
    """

    groups: tuple[tuple[str, ...], ...]
    assignment: Mapping[str, tuple[str, ...]]
    gains: Mapping[str, float]
    score: float


def best_groups(
    gains: Tensor,
    tasks: Sequence[str] | None = None,
    *,
    groups: int,
    alone: Tensor | Sequence[float] | None = None,
    overlap: bool = True,
) -> GroupSelection:
    """Return the at most ``groups`` groups that help the tasks most, exactly, for up to 12 tasks.

    A task of a group scores the mean of ``gains[task, other]`` over the others of the group; a task of several groups is
    read from the one where it scores most. No other choice of groups that have all tasks between them makes the mean over
    tasks larger (TAG, section 3.2). Of equally good choices, the one with the fewest groups.

    TAG's code enumerates sets of groups. Here dynamic programming over subsets, ``3^T`` steps whatever the gains, finds
    the same optimum: the tasks that are read from one group form a class, so that the best set of groups is the best
    partition into classes, each of which may choose any group that contains it.

    Args:
        gains: ``[T, T]``, any real numbers: in row i and column j, what task i gains if trained together with task j. Need
            not be symmetric; the diagonal plays no part. The view ``"tag"`` of a relation report, or any score of pairs.
        tasks: their names; their numbers if left out.
        groups: most groups, from 1 to T.
        alone: ``[T]``, what each task scores in a group of its own, in units of ``gains``. Without it no task is trained
            alone, which is what TAG's code means by -1e6.
        overlap: whether a task may help in a group that it is not read from. Without, every task is in exactly one group.

    Raises:
        ConfigurationError: more than 12 tasks (use :func:`task_groups`), or ``groups`` out of range.
        NonFiniteError: a gain is NaN or infinite; the message names the pairs.
        ShapeError: ``gains`` is not square, ``alone`` not ``[T]``.
        TaskError: fewer than three tasks, or names that are not unique or not one per row.

    >>> import torch
    >>> from saliency_reg import best_groups
    >>> gains = torch.tensor([[0.0, 0.4, 0.1], [0.3, 0.0, 0.2], [0.1, 0.5, 0.0]])
    >>> found = best_groups(gains, ["depth", "normals", "edges"], groups=2)
    >>> found.groups
    (('depth', 'normals'), ('normals', 'edges'))
    >>> found.assignment["normals"], round(found.score, 3)
    (('depth', 'normals'), 0.4)
    """
    matrix = square(gains, "gains")
    names = names_for(tasks, len(matrix))
    size = len(names)
    check_known(matrix, names, "gains", diagonal=False)
    check_number(groups, size)
    if size > MOST_TASKS:
        raise ConfigurationError(
            f"found {size} tasks; the exact search takes 3^T steps and goes up to {MOST_TASKS}. "
            "Use task_groups(affinity, tasks, groups), which clusters any number."
        )
    scores = _scores(matrix, _own_gains(alone, size))
    chosen = _search(scores, groups, overlap)
    # Each task from its best group; of groups that are equally good for it, from the first.
    read = [max((group for group in chosen if group >> i & 1), key=lambda group: scores[group, i]) for i in range(size)]
    members = {
        group: tuple(name for i, name in enumerate(names) if group >> i & 1) for group in chosen if group in read
    }
    found = {name: float(scores[group, i]) for i, (name, group) in enumerate(zip(names, read))}
    return GroupSelection(
        groups=tuple(members.values()),
        assignment={name: members[group] for name, group in zip(names, read)},
        gains=found,
        score=math.fsum(found.values()) / size,
    )


def _own_gains(alone: Tensor | Sequence[float] | None, size: int) -> Tensor:
    if alone is None:
        return torch.full((size,), -math.inf, dtype=torch.float64, device="cpu")
    try:
        own = torch.as_tensor(alone, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongTypeError(f"alone must be {size} numbers, found {type(alone).__name__}.") from error
    if own.shape != (size,):
        raise ShapeError(f"alone must have the shape [T] = [{size}], found {list(own.shape)}.")
    if not bool(own.isfinite().all()):
        raise NonFiniteError(
            f"alone must be finite, found {own.tolist()}. Leave it out if no task shall be trained alone."
        )
    return own


def _scores(gains: Tensor, own: Tensor) -> Tensor:
    """Return what each task scores in each group, ``[2^T, T]``; bit i of a group's number says whether task i is in it."""
    size = len(gains)
    others = gains.masked_fill(torch.eye(size, dtype=torch.bool, device="cpu"), 0.0)
    member = _member(2**size, size)
    count = member.sum(dim=1, keepdim=True)
    mean = member.to(gains.dtype) @ others.T / (count - 1).clamp(min=1)
    return torch.where(member, torch.where(count == 1, own, mean), -math.inf)


def _search(scores: Tensor, groups: int, overlap: bool) -> list[int]:
    """Return the numbers of the best at most ``groups`` groups, in the order of their tasks."""
    count, size = scores.shape
    margin = 1e-13 * size * float(scores[scores.isfinite()].abs().max())  # what rounding may make of equal sums
    value, group = _best_group_of_class(scores, margin) if overlap else _class_itself(scores)
    # best[k, s]: largest sum over the tasks of s in k + 1 classes; first[k, s]: the class of the first of them
    best = torch.full((groups, count), -math.inf, dtype=scores.dtype, device="cpu")
    best[0] = value
    first = torch.arange(count, device="cpu").repeat(groups, 1)
    for subset in range(1, count) if groups > 1 else ():
        lowest, *others = _bits(subset)
        if others:
            classes = lowest + _subsets(others)[:-1]  # without the last, the subset itself
            best[1:, subset], where = (value[classes] + best[:-1, subset - classes]).max(dim=1)
            first[1:, subset] = classes[where]
    left = count - 1
    number = int((best[:, left] >= best[:, left].max() - margin).nonzero()[0])  # the fewest classes
    chosen = set()
    for row in range(number, -1, -1):
        part = int(first[row, left])
        chosen.add(int(group[part]))
        left -= part
    return sorted(chosen, key=_bits)


def _class_itself(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of the scores of each class in the group that is the class, ``[2^T]``, and the numbers of those."""
    return torch.where(_member(*scores.shape), scores, 0.0).sum(dim=1), torch.arange(len(scores), device="cpu")


def _best_group_of_class(scores: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Return the largest sum of scores of each class in any group that contains it, ``[2^T]``, and that group."""
    value = torch.full((len(scores),), -math.inf, dtype=scores.dtype, device="cpu")
    group = torch.arange(len(scores), device="cpu")
    for number in sorted(range(1, len(scores)), key=int.bit_count):  # of equal groups, the smallest
        classes = _subsets(_bits(number))
        sums = torch.zeros(1, dtype=scores.dtype, device="cpu")
        for bit in _bits(number):
            sums = torch.cat([sums, sums + scores[number, bit.bit_length() - 1]])
        better = sums > value[classes] + margin
        value[classes[better]] = sums[better]
        group[classes[better]] = number
    return value, group


def _member(count: int, size: int) -> Tensor:
    return ((torch.arange(count, device="cpu").unsqueeze(1) >> torch.arange(size, device="cpu")) & 1).bool()


def _bits(number: int) -> list[int]:
    return [1 << i for i in range(number.bit_length()) if number >> i & 1]


def _subsets(bits: Sequence[int]) -> Tensor:
    """Return the sums of all subsets of some bits, the whole last; the order in which sums are doubled, too."""
    subsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for bit in bits:
        subsets = torch.cat([subsets, subsets + bit])
    return subsets
