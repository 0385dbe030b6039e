"""Forwards that no call of the regularizer reads."""

from __future__ import annotations

from ..torch_tools import warn_user


class UnreadForwards:
    """Counts them between two optimizer steps, and tells of them once."""

    def __init__(self, *, told: bool = False) -> None:
        self._evaluated = self._trained = 0
        self._told = told

    def add(self, training: bool) -> None:
        """Count one, in train or in eval mode."""
        if training:
            self._trained += 1
        else:
            self._evaluated += 1

    def clear(self) -> None:
        """Begin anew: an optimizer took a step."""
        self._evaluated = self._trained = 0

    def before(self, training: bool) -> None:
        """Tell, when a forward is read, of those before it; loops evaluate between their steps."""
        unread = self._trained if training else self._trained + self._evaluated
        self.clear()
        if unread and not self._told:
            self._told = True
            warn_user(
                f"{unread + 1} forwards ran before this call, whose penalty is that of the latest one alone. Call the "
                "regularizer after each forward, and add up what it returns; run those that it is not meant for under "
                "no_grad."
            )
