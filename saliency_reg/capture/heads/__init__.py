"""Heads: found by what the user calls them (``resolve``), or without (``head_search``).

``branches`` are heads of several modules, ``column_groups`` several columns of one for each task.
"""

from .branches import Branch, comes_from, first_part, goes_on_message, last_part
from .column_groups import ColumnGroups, ColumnsChoice
from .head_search import is_container
from .resolve import Heads, HeadsChoice, check_not_compiled, is_compiled, items_per_head, of_methods, resolve_heads

__all__ = [
    "Branch",
    "ColumnGroups",
    "ColumnsChoice",
    "Heads",
    "HeadsChoice",
    "check_not_compiled",
    "comes_from",
    "first_part",
    "goes_on_message",
    "is_compiled",
    "is_container",
    "items_per_head",
    "last_part",
    "of_methods",
    "resolve_heads",
]
