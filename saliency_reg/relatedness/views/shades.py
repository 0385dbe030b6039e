"""One colour scale for each view: orange is close, purple the opposite, in tables and pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kinds import ViewKind

#: Cosines and correlations smaller than this look small, whatever the others are.
_LEAST_SIGNED = 0.1
#: A scale of a view without signs covers at least this share of its largest entry.
_LEAST_SPAN = 0.1


@dataclass(frozen=True)
class Scale:
    """From which entry to which a view's colours reach.

    Attributes:
        low, high: the ends.
        middle: the entry that has no colour, or ``None``: then the end of the tasks that are farthest apart has none.
        turned: whether ``low`` is close, as in a distance.
    """

    low: float
    high: float
    middle: float | None
    turned: bool

    def shade(self, value: float) -> float:
        """Return how close an entry is: from -1, opposed, over 0 to 1, close."""
        if self.middle is None:
            share = (value - self.low) / (self.high - self.low)
            return max(0.0, min(1.0, 1 - share if self.turned else share))
        side = self.high - self.middle if value > self.middle else self.middle - self.low
        return max(-1.0, min(1.0, (value - self.middle) / side))

    def text(self, value: float) -> str:
        """Return an entry as a short number, with digits that suit the largest entry of the view."""
        if value == 0:
            return "0"
        largest = max(abs(self.low), abs(self.high))
        for least, digits in ((100, 0), (10, 1), (0.1, 2), (0.01, 3)):
            if largest >= least:
                return f"{value:.{digits}f}"
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}"


def scale_of(kind: ViewKind, matrix: Tensor) -> Scale:
    """Return the scale for the entries between two tasks of ``[T, T]``.

    Views with signs are centred at 0, weights at their mean, which is that of uniform ones; the others reach from their
    smallest to their largest entry.
    """
    off = ~torch.eye(len(matrix), dtype=torch.bool)
    known = matrix[off & ~matrix.isnan()]
    low, high = (float(known.min()), float(known.max())) if known.numel() else (0.0, 0.0)
    if kind.signed:
        limit = max(abs(low), abs(high), _LEAST_SIGNED if kind.highest == 1 else 0.0) or 1.0
        return Scale(-limit, limit, 0.0, turned=False)
    if kind.highest != 1 and kind.closer == "larger":
        mean = float(known.mean()) if known.numel() and high > 0 else 1.0
        return Scale(0.0, max(2 * mean, high), mean, turned=False)
    low = min(low, (1 - _LEAST_SPAN) * high)
    return Scale(low, high if high > low else low + 1.0, None, turned=kind.closer == "smaller")
