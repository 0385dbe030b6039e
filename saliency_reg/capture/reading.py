"""The latest forward as it is read: taken once, or looked at; and forwards that no call reads."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn

from ..errors import CaptureError, NoHeadRanError
from ..torch_tools import warn_user
from .aliases import HeadAliases
from .forward import CapturedForward, RecordedForward, Ways, checked_forward
from .graph_names import Names, Tracing, tell_of_readers
from .heads import Heads
from .other_heads import OtherHeads
from .raw_inputs import RawInputs


class LatestForward:
    """Holds the latest forward until somebody takes it. Who records it, derives from this class."""

    heads: Heads
    feature_names: Sequence[str]
    aliases: HeadAliases
    run_all: bool
    #: Whether somebody looks at forwards without taking them.
    observed: bool = False
    _model: weakref.ref[nn.Module]
    _latest: RecordedForward | None = None
    _kept: RecordedForward | None = None  # taken before it was looked at
    _why_none: str
    _running: bool  # the model's own forward
    _ways: Sequence[Ways]
    _other_heads: OtherHeads
    _tracing: Tracing
    _raw_inputs: RawInputs
    _looked_behind: bool
    _changes_output: dict[int, bool]
    _unread: UnreadForwards

    def drop(self) -> None:
        """Drop the latest forward and free its graph. A forward without gradients is kept, because it holds no graph."""
        if self._latest is not None and self._latest.active:
            self._forget("the latest forward was dropped by a call without gradients. Call the model again")

    def stepped(self) -> None:
        """Note an optimizer step: the forwards before it are over, read or not."""
        self._unread.clear()
        if self._latest is not None:
            self._latest.over = True

    def device(self) -> torch.device | None:
        """Return where the heads are."""
        raise NotImplementedError

    def take(self, *, empty_on: torch.device | None = None) -> CapturedForward | None:
        """Return the latest forward and release it; ``None`` if it ran without gradients.

        With ``empty_on``, also return a forward without heads, as other processes may have some: on the device of the
        heads, or else on this one.
        """
        if (recorded := self._waiting(empty_on)) is None:
            return None
        self._unread.before(recorded.training)
        recorded.carried = self.aliases.end_forward()
        self._forget(
            "the latest forward was read already, and each is read once. Call the model before each call of the regularizer "
            "(not a copy or an export of it, on which no hooks are)"
        )
        self._kept = recorded if self.observed and not recorded.looked_at else None
        self._running = False
        return self._checked(recorded, empty_on)

    def look(self, *, empty_on: torch.device | None = None) -> CapturedForward | None:
        """Return what :meth:`take` returns, or has returned, and leave the forward to who takes it. Once for each.

        For captures that are ``observed``. Nothing of a training changes.
        """
        recorded, self._kept = self._kept, None
        if recorded is None and (recorded := self._waiting(empty_on)) is not None:
            if recorded.looked_at:
                raise CaptureError("the latest forward was looked at already. Call the model before each update.")
            recorded.carried = self.aliases.end_forward()
            self._running = False
        if recorded is None:
            return None
        recorded.looked_at = True
        return self._checked(recorded, empty_on)

    def look_away(self) -> None:
        """Let the latest forward pass without a look at it."""
        self._kept = None
        if self._latest is not None:
            self._latest.looked_at = True

    def _waiting(self, empty_on: torch.device | None) -> RecordedForward | None:
        """Return the forward that nobody has taken, with all heads that are to run in it."""
        recorded = self._latest
        if recorded is None:
            raise CaptureError(f"{self._why_none.rstrip('.')}.")
        if not recorded.active:
            return None
        if self.run_all and recorded.problem is None:
            self._running = True  # it is no new forward
            self._other_heads.run(recorded, alone=empty_on is None)
        for index, run in recorded.ended.items():
            self._changes_output[index] = self._changes_output.get(index, False) or run.output_changed
        return recorded

    def _checked(self, recorded: RecordedForward, empty_on: torch.device | None) -> CapturedForward | None:
        try:
            names = Names(self._model(), recorded.trace)
            forward = checked_forward(recorded, self.heads, self.feature_names, self._ways, names)
        except NoHeadRanError as error:
            if empty_on is None:
                raise
            modules, columns = self.heads.modules, self.heads.columns
            return CapturedForward([], [], [], self.device() or empty_on, modules, columns, no_heads=error)
        self._tracing.wanted &= forward is None
        self._raw_inputs.look(forward)
        if forward is not None and recorded.returned is not None and not self._looked_behind:
            self._looked_behind = True
            tell_of_readers(self._model(), self.heads, dict(zip(forward.ran, forward.outputs)), recorded.returned)
        return forward

    def _forget(self, why: str) -> None:
        self._latest = self._kept = None
        self._why_none = why
        self.aliases.forget()


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
