"""Views of the relations between tasks: matrices by name, and what can be made of them.

Read ``kinds`` (which views there are) and ``relation_views`` (all that can be done with them) first.
"""

from .checks import checked_affinity
from .comparison import ViewComparison, compare_views
from .kinds import VIEWS, ViewKind
from .linkage import average_linkage
from .pairs import ClosePair
from .relation_views import RelationViews
from .shades import Scale, scale_of

__all__ = [
    "VIEWS",
    "ClosePair",
    "RelationViews",
    "Scale",
    "ViewComparison",
    "ViewKind",
    "average_linkage",
    "checked_affinity",
    "compare_views",
    "scale_of",
]
