"""Which columns of one head belong to each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Union

from ...errors import TaskError, WrongTypeError

#: What the public ``columns=`` accepts.
ColumnsChoice = Union[Mapping[str, Union[slice, int, Sequence[int]]], None]


class ColumnGroups:
    """The columns of each task, as they were given; those of no task belong to nobody."""

    def __init__(self, columns: ColumnsChoice) -> None:
        if not isinstance(columns, Mapping):
            raise WrongTypeError(
                f"columns must be a mapping {{task: a slice, number or list of numbers}}, found {type(columns).__name__}."
            )
        self.tasks = [str(task) for task in columns]
        self._given = list(columns.values())
        self._known: tuple[int, list[Sequence[int]]] | None = None

    @property
    def given(self) -> dict[str, object]:
        """``{task: columns}`` as they were given."""
        return dict(zip(self.tasks, self._given))

    def of(self, width: int) -> list[Sequence[int]]:
        """Return the columns of each task among ``width`` of them."""
        if self._known is None or self._known[0] != width:
            self._known = width, self._checked(width)
        return self._known[1]

    def _checked(self, width: int) -> list[Sequence[int]]:
        found = [self._one(task, given, width) for task, given in zip(self.tasks, self._given)]
        owner: dict[int, str] = {}
        for task, columns in zip(self.tasks, found):
            for column in columns:
                if owner.setdefault(column, task) != task:
                    raise TaskError(
                        f"columns= gives column {column} to the tasks {owner[column]!r} and {task!r}. Give each to one."
                    )
        return found

    @staticmethod
    def _one(task: str, given: object, width: int) -> Sequence[int]:
        every = range(width)
        try:
            if isinstance(given, slice):
                columns: Sequence[int] = every[given]
                # Python lets a slice end behind the last column.
                outside = given.stop is not None and given.stop > width
            else:
                columns = [every[one] for one in (given if isinstance(given, (list, tuple, range)) else [given])]  # type: ignore[index]
                outside = False
        except IndexError:
            outside = True
        except TypeError:
            raise WrongTypeError(
                f"the columns of task {task!r} must be a slice, a number or a list of numbers, found {given!r}."
            ) from None
        if outside or len(columns) == 0 or len(set(columns)) < len(columns):
            raise TaskError(
                f"columns= of task {task!r} are {given!r}, but the head has {width} columns. Pass at least one of them, "
                "each once, e.g. slice(0, 4)."
            )
        first, last = min(columns), max(columns)
        together = list(columns) == list(range(first, last + 1))
        return range(first, last + 1) if together else list(columns)
