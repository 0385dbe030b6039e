"""What can be taken off a model or an optimizer again, by hand or at the end of a ``with`` block."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

__all__ = ["Removable"]

_Self = TypeVar("_Self", bound="Removable")


class Removable:
    """``with`` calls :meth:`remove` at its end."""

    def remove(self) -> None:
        """Take everything off."""
        raise NotImplementedError

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
