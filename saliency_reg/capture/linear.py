"""Whether a head's output is what its weight says, ``x @ weight.T + bias``: only then is the saliency its weight row."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Optional

from torch import Tensor, nn

from ..torch_tools import Edge, has_only_our_hooks, version_of
from .places import as_edge

#: A parameter's in-place changes so far, and where its entries are.
Weight = Optional[tuple[int, int]]

_VIEWS = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"}
#: Nodes behind an output: views, and the copy that is kept of one that the model changes in place.
_OF_THE_OUTPUT = {*_VIEWS, "CloneBackward0"}
#: Nodes that a tensor may pass on its way into the product: views, and the casts of autocast.
_ON_THE_WAY = {*_VIEWS, "ToCopyBackward0", "TBackward0", "CloneBackward0", "UnsqueezeBackward0"}
#: Products, with the places of input, weight and bias among what they are made of.
_PRODUCTS = {"AddmmBackward0": (1, 2), "MmBackward0": (0, 1), "LinearBackward0": (0, 1)}


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is a ``Linear`` as torch has it: no subclass, no parametrisation, no foreign hook, no patched forward."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and has_only_our_hooks(module)
    )


def weight_as_now(module: nn.Module) -> Weight:
    """Return what tells whether the weight of a plain ``Linear`` has changed since; ``None`` for another module."""
    return _state_of(module) if is_plain_linear(module) else None


def is_product(head: nn.Module, weight: Weight, output: Tensor, source: Edge) -> bool:
    """Whether ``output`` is the product of ``source`` and a weight that the head still has, as ``weight_as_now`` gave it.

    The graph tells, by a few of its nodes; of frozen weights, which are not in it, it does not.
    """
    if weight is None or weight != _state_of(head):
        return False
    node: Any = _behind(output.grad_fn, _OF_THE_OUTPUT)
    if type(node).__name__ == "AddBackward0":  # the bias was added apart
        (node, _), (bias, _) = node.next_functions
        if bias is not None and _leaf(bias) is not head.bias:
            return False
        node = _behind(node, _VIEWS)
    if (places := _PRODUCTS.get(type(node).__name__)) is None:
        return False
    made_of = node.next_functions
    return _leaf(made_of[places[1]][0]) is head._parameters["weight"] and _comes_from(made_of[places[0]], source)


def _state_of(module: nn.Module) -> Weight:
    weight = module._parameters.get("weight")
    return None if weight is None else (version_of(weight), weight.data_ptr())


def _behind(node: Any, passed: Container[str]) -> Any:
    while type(node).__name__ in passed:
        node = node.next_functions[0][0]
    return node


def _leaf(node: Any) -> Any:
    return getattr(_behind(node, _ON_THE_WAY), "variable", None)


def _comes_from(edge: tuple[Any, int], source: Edge) -> bool:
    place = as_edge(source)
    while edge != place and type(edge[0]).__name__ in _ON_THE_WAY:
        edge = edge[0].next_functions[0]
    return edge == place
