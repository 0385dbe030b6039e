"""Heads: found by what the user calls them (``resolve``), or without (``head_search``).

``branches`` are heads of several modules, ``column_groups`` several columns of one for each task. ``changed`` are those of a
model in which a task has come or gone; ``attachable`` tells whether hooks can be set on them.
"""

from .attachable import check_attachable
from .branches import Branch, comes_from, first_part, goes_on_message, last_part
from .changed import heads_with, heads_without
from .column_groups import ColumnGroups, ColumnsChoice
from .head_search import is_container
from .resolve import Heads, HeadsChoice, check_not_compiled, is_compiled, items_per_head, of_methods, resolve_heads

__all__ = [
    "Branch",
    "ColumnGroups",
    "ColumnsChoice",
    "Heads",
    "HeadsChoice",
    "check_attachable",
    "check_not_compiled",
    "comes_from",
    "first_part",
    "goes_on_message",
    "heads_with",
    "heads_without",
    "is_compiled",
    "is_container",
    "items_per_head",
    "last_part",
    "of_methods",
    "resolve_heads",
]
