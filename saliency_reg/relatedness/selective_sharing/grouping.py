"""Who uses whose estimator: a number per task, that of the task whose estimator survives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import StateMismatchError, TaskError

Grouping = tuple[tuple[str, ...], ...]


def named_groups(tasks: Sequence[str], numbers: Sequence[int]) -> Grouping:
    """Return the tasks with equal numbers as groups, in the order of the tasks."""
    found: dict[int, list[str]] = {}
    for task, number in zip(tasks, numbers):
        found.setdefault(number, []).append(task)
    return tuple(map(tuple, found.values()))


def check_not_parted(tasks: Sequence[str], survivors: Sequence[int], numbers: Sequence[int]) -> None:
    """Raise an error if tasks that share would come into different groups, whose number each task has here."""
    for task, survivor in enumerate(survivors):
        if numbers[task] != numbers[survivor]:
            raise TaskError(
                f"the tasks {tasks[survivor]!r} and {tasks[task]!r} share an estimator already, and cannot be parted. Keep "
                f"them in one group; the groups now are {named_groups(tasks, survivors)}."
            )


def survivors_in(saved: object) -> list[int] | None:
    """Return the survivors of a state dict; ``None`` if it has none, or none with values."""
    if not isinstance(saved, Tensor) or saved.is_meta:
        return None
    return [int(number) for number in saved.tolist()]


def check_can_become(tasks: Sequence[str], survivors: Sequence[int], new: Sequence[int]) -> None:
    """Raise an error unless merging can lead from these survivors to the new ones, which were loaded."""
    if any(one >= len(new) or new[one] != one for one in new):
        raise StateMismatchError(f"the survivors in the state dict are {list(new)}, which is no grouping.")
    parted = any(new[task] != new[survivor] for task, survivor in enumerate(survivors))
    if parted or not set(new) <= set(survivors):
        of_saved, of_now = ([tasks[one] for one in sorted(set(each))] for each in (new, survivors))
        raise StateMismatchError(
            f"the state dict has the groups {named_groups(tasks, new)} with the estimators of {of_saved}, but here "
            f"{named_groups(tasks, survivors)} share those of {of_now} already, and cannot be parted. Build the model anew. "
            "Nothing was loaded."
        )
