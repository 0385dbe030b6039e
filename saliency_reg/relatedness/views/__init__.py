"""Views of the relations between tasks: matrices by name, and what can be made of them."""

from .kinds import VIEWS, ViewKind
from .relation_views import RelationViews

__all__ = ["VIEWS", "RelationViews", "ViewKind"]
