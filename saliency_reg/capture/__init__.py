"""Capturing one forward: the shared feature maps, the heads that ran, and their outputs.

Read in this order: ``feature_capture`` (:class:`FeatureCapture`, the hooks), ``forward`` (:class:`CapturedForward`, which
they leave behind), ``places`` (where a tensor is in the graph, whatever is done to it in place), ``aliases``
(:class:`HeadAliases`, a view for each head; surgery hands out its own, of which nothing is known here), ``raw_inputs``
(where the input of a module was named). ``choices``, ``heads`` and ``lookup`` find what the user names, ``nested`` finds
tensors in nested arguments.
"""

from .aliases import HeadAliases, is_plainly
from .choices import FeatureChoice
from .feature_capture import FeatureCapture
from .forward import CapturedForward, FeatureMap, HeadRun
from .heads import Heads, HeadsChoice, check_not_compiled, is_plain_linear, resolve_heads
from .lookup import find_module
from .nested import Item, Path, contents, put, put_argument, tensors_in
from .places import as_edge

__all__ = [
    "CapturedForward",
    "FeatureCapture",
    "FeatureChoice",
    "FeatureMap",
    "HeadAliases",
    "HeadRun",
    "Heads",
    "HeadsChoice",
    "Item",
    "Path",
    "as_edge",
    "check_not_compiled",
    "contents",
    "find_module",
    "is_plain_linear",
    "is_plainly",
    "put",
    "put_argument",
    "resolve_heads",
    "tensors_in",
]
