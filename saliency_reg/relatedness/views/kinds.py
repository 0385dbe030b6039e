"""The views there are, and how each is to be read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ViewKind:
    """How a view is to be read.

    Attributes:
        key: its name in files and arguments.
        label: for people.
        closer: ``"larger"`` if larger entries mean tasks that are closer, ``"smaller"`` for a distance.
        symmetric: whether entry ``(i, j)`` is entry ``(j, i)``.
    """

    key: str
    label: str
    closer: str = "larger"
    symmetric: bool = True


#: All views by their key, in the order in which they are shown.
VIEWS = {
    kind.key: kind
    for kind in (
        ViewKind("saliency_distance", "Saliency distance", closer="smaller"),
        ViewKind("relation_weights", "Relation weights"),
        ViewKind("gradient_cosine", "Gradient cosine"),
        ViewKind("error_cooccurrence", "Error co-occurrence"),
        ViewKind("error_kappa", "Error co-occurrence, chance-corrected"),
        ViewKind("label_correlation", "Label correlation"),
        ViewKind("tag", "TAG affinity", symmetric=False),
    )
}
