"""Pictures of relations and saliencies, of any model: heat map and tree of the tasks, maps over images.

>>> from saliency_reg.integrations.plot import draw_relations, draw_saliency, draw_task_tree, task_order

Each picture is a matplotlib ``Figure``, and written where a path is given. None goes through pyplot: no window, nothing to
close. Tensors (on any device), numpy arrays and nested lists are all accepted.
"""

from .relations import draw_relations, draw_task_tree, task_order
from .saliency import draw_saliency

__all__ = ["draw_relations", "draw_saliency", "draw_task_tree", "task_order"]
