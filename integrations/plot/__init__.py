"""Pictures of relations and saliencies, of any model: heat maps, tree and graph of the tasks, maps over images.

>>> from saliency_reg.integrations.plot import draw_relations, draw_saliency, draw_task_tree, task_order
>>> from saliency_reg.integrations.plot import draw_view_graph, draw_view_tree, draw_views  # of RelationViews

Each picture is a matplotlib ``Figure``, and written where a path is given. None goes through pyplot: no window, nothing to
close. Tensors (on any device), numpy arrays and nested lists are all accepted.
"""

from .graph import draw_view_graph
from .relations import draw_relations, draw_task_tree, task_order
from .saliency import draw_saliency
from .views import draw_view_tree, draw_views

__all__ = [
    "draw_relations",
    "draw_saliency",
    "draw_task_tree",
    "draw_view_graph",
    "draw_view_tree",
    "draw_views",
    "task_order",
]
