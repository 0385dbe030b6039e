"""The views there are, and how each is to be read."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ViewKind:
    """How a view is to be read.

    Attributes:
        key: its name in files and arguments.
        label: for people.
        closer: ``"larger"`` if larger entries mean tasks that are closer, ``"smaller"`` for a distance.
        symmetric: whether entry ``(i, j)`` is entry ``(j, i)``.
        lowest, highest: between which all entries are, by the view's definition.
    """

    key: str
    label: str
    closer: str = "larger"
    symmetric: bool = True
    lowest: float = -math.inf
    highest: float = math.inf

    @property
    def signed(self) -> bool:
        """Whether the sign of an entry says something: 0 is neither close nor opposed."""
        return self.lowest < 0


#: All views by their key, in the order in which they are shown.
VIEWS = {
    kind.key: kind
    for kind in (
        ViewKind("saliency_distance", "Saliency distance", closer="smaller", lowest=0.0),
        ViewKind("relation_weights", "Relation weights", lowest=0.0),
        ViewKind("gradient_cosine", "Gradient cosine", lowest=-1.0, highest=1.0),
        ViewKind("error_cooccurrence", "Error co-occurrence", lowest=0.0, highest=1.0),
        ViewKind("error_kappa", "Error co-occurrence, chance-corrected", lowest=-1.0, highest=1.0),
        ViewKind("label_correlation", "Label correlation", lowest=-1.0, highest=1.0),
        ViewKind("tag", "TAG affinity", symmetric=False),
    )
}
