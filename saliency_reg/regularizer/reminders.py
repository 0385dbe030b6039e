"""What a user is told once, after it has gone on for a while."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..torch_tools import warn_user

#: Training calls without a step of the relations, or without a run of some head, after which the user is told.
CALLS = 100
_NO_OPTIMIZER = (
    f"the relations have not moved in {CALLS} training calls: no optimizer is attached. Pass optimizer=..., call "
    "regularizer.attach_optimizer(optimizer), or call regularizer.step() after each update."
)
_NO_STEP = (
    f"the relations have not moved in {CALLS} training calls: the attached optimizer took no step. That is right if you "
    "accumulate so many batches. If you made a new optimizer, call regularizer.attach_optimizer(optimizer); an engine that "
    "never calls the optimizer's hooks needs regularizer.step()."
)
_NEVER_RAN = (
    f"the heads of {{tasks}} have not run in {CALLS} training calls, so the penalty leaves them out. If a head was replaced "
    "after attaching, call .remove() and build the regularizer anew."
)


class Reminders:
    """Counts training calls, and warns once of each thing that should have happened by now."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tuple(tasks)
        self._seen: set[int] = set()
        self._told: set[str] = set()
        self._calls = 0
        self._since_step = 0

    def stepped(self) -> None:
        """Note that the relations were given the chance to move."""
        self._since_step = 0

    def called(self, present: Iterable[int], has_optimizer: bool) -> None:
        """Note a training call with these tasks."""
        self._seen.update(present)
        self._calls += 1
        self._since_step += 1
        if self._since_step == CALLS:
            self._tell("steps", _NO_STEP if has_optimizer else _NO_OPTIMIZER)
        if self._calls == CALLS and len(self._seen) < len(self._tasks):
            missing = [task for index, task in enumerate(self._tasks) if index not in self._seen]
            self._tell("tasks", _NEVER_RAN.format(tasks=missing))

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warn_user(message)
