"""Base classes of objects attached to a model or an optimizer: detached by hand or by ``with``, and not copied along."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

_Self = TypeVar("_Self", bound="Removable")


class Removable:
    """Base class for objects attached to a model or an optimizer: ``with`` calls :meth:`remove` at its end."""

    def remove(self) -> None:
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


class PartlyCopied:
    """Base class for objects whose copies and pickles leave behind what belongs to the original: hooks, groups, reports."""

    #: The values that such attributes have in a copy; those of base classes count, too.
    in_a_copy: ClassVar[dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).copy()
        for kind in reversed(type(self).__mro__):
            state.update(vars(kind).get("in_a_copy", {}))
        return state
