"""Whether a head's output is what its weight says, ``x @ weight.T + bias``: only then is the saliency its weight row."""

from __future__ import annotations

from typing import Any, Optional

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ..torch_tools import Edge, has_only_our_hooks, version_of

#: A parameter's in-place changes so far, and where its entries are.
Weight = Optional[tuple[int, int]]

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
#: Nodes that a tensor may pass on its way into the product: views, and the casts of autocast.
_ON_THE_WAY = (*_VIEWS, "ToCopyBackward0", "TBackward0", "CloneBackward0", "UnsqueezeBackward0")
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
    if not is_plain_linear(module):
        return None
    weight = module.get_parameter("weight")
    return version_of(weight), weight.data_ptr()


def is_product(head: nn.Module, output: Tensor, source: Edge) -> bool:
    """Whether the graph of ``output`` says that it is the product of ``source`` and the weight that the head has now.

    A few nodes are looked at. Frozen weights are not in the graph: then it cannot be told.
    """
    node: Any = output.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    if node is not None and node.name() == "AddBackward0":  # the bias was added apart
        node, bias = (following for following, _ in node.next_functions)
        if bias is not None and _leaf(bias) is not head.bias:
            return False
        while node is not None and node.name() in _VIEWS:
            node = node.next_functions[0][0]
    places = None if node is None else _PRODUCTS.get(node.name())
    if places is None:
        return False
    read, weight = (node.next_functions[place][0] for place in places)
    return weight is not None and _leaf(weight) is head.weight and _comes_from(read, source)


def _leaf(node: Any) -> Any:
    while node is not None and node.name() in _ON_THE_WAY:
        node = node.next_functions[0][0]
    return getattr(node, "variable", None)


def _comes_from(node: Any, source: Edge) -> bool:
    if not isinstance(source, GradientEdge) and source.grad_fn is None:
        return _leaf(node) is source
    at = source.node if isinstance(source, GradientEdge) else source.grad_fn
    while node is not None and node != at and node.name() in _ON_THE_WAY:
        node = node.next_functions[0][0]
    return node is not None and bool(node == at)
