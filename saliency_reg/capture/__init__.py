"""Capturing one forward: the shared feature maps, the heads that ran, and their outputs.

Read in this order: ``feature_capture`` (:class:`FeatureCapture`, the hooks), ``forward`` (:class:`CapturedForward`, which
they leave behind), ``places`` (where a tensor is in the graph, whatever is done to it in place), ``aliases``
(:class:`HeadAliases`, a view for each head; surgery hands out its own, of which nothing is known here), ``raw_inputs``
(where the input of a module was named), ``reading`` (how a forward is taken, or looked at). ``heads`` and ``lookup`` find
modules by their names, ``graph_names`` in the graph of a forward; ``other_heads`` runs those that did not run. ``nested``
finds tensors in nested arguments; ``linear`` tells whether a head's output is what its weight says.
"""

from .aliases import HeadAliases
from .feature_capture import FeatureCapture
from .forward import CapturedForward, FeatureMap, HeadRun
from .heads import (
    ColumnGroups,
    ColumnsChoice,
    Heads,
    HeadsChoice,
    check_not_compiled,
    heads_with,
    heads_without,
    is_compiled,
    resolve_heads,
)
from .linear import is_plain_linear, is_product, weight_as_now
from .lookup import FeatureChoice, find_module
from .nested import Item, Path, contents, put, put_argument, tensors_in
from .other_heads import HeadCall
from .places import as_edge, is_plainly

__all__ = [
    "CapturedForward",
    "ColumnGroups",
    "ColumnsChoice",
    "FeatureCapture",
    "FeatureChoice",
    "FeatureMap",
    "HeadAliases",
    "HeadCall",
    "HeadRun",
    "Heads",
    "HeadsChoice",
    "Item",
    "Path",
    "as_edge",
    "check_not_compiled",
    "contents",
    "find_module",
    "heads_with",
    "heads_without",
    "is_compiled",
    "is_plain_linear",
    "is_plainly",
    "is_product",
    "put",
    "put_argument",
    "resolve_heads",
    "tensors_in",
    "weight_as_now",
]
