"""Capturing one forward: the shared feature maps, the heads that ran, and their outputs.

Read in this order: ``feature_capture`` (:class:`FeatureCapture`, the hooks), ``forward`` (:class:`CapturedForward`, which
they leave behind), ``aliases`` (:class:`HeadAliases`, a view for each head; surgery hands out its own, of which nothing is
known here). ``heads`` and ``lookup`` find modules by what the user calls them, ``head_search`` without, and ``graph_names``
in the graph of a forward. ``branches`` are heads of several modules, ``column_groups`` several columns of one for each task.
``nested`` finds tensors in nested arguments; ``linear`` tells whether a head's output is what its weight says.
"""

from .aliases import HeadAliases
from .column_groups import ColumnGroups, ColumnsChoice
from .feature_capture import FeatureCapture
from .forward import CapturedForward, FeatureMap, HeadRun
from .heads import Heads, HeadsChoice, check_not_compiled, resolve_heads
from .linear import is_plain_linear, is_product, weight_as_now
from .lookup import FeatureChoice, find_module
from .nested import Item, Path, contents, put, put_argument, tensors_in

__all__ = [
    "CapturedForward",
    "ColumnGroups",
    "ColumnsChoice",
    "FeatureCapture",
    "FeatureChoice",
    "FeatureMap",
    "HeadAliases",
    "HeadRun",
    "Heads",
    "HeadsChoice",
    "Item",
    "Path",
    "check_not_compiled",
    "contents",
    "find_module",
    "is_plain_linear",
    "is_product",
    "put",
    "put_argument",
    "resolve_heads",
    "tensors_in",
    "weight_as_now",
]
