"""Walks through the autograd graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["leaves_behind", "nodes_behind"]


def nodes_behind(roots: Iterable[Node | None], stop: Collection[Node] = ()) -> Iterator[Node]:
    """Each node once, from the roots towards the leaves; not beyond those of ``stop``, which are left out."""
    seen = set(stop)
    waiting = [node for node in roots if node is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions if following is not None]


def leaves_behind(tensors: Iterable[Tensor], stop: Collection[Node] = ()) -> list[Tensor]:
    """The leaf tensors (parameters, mostly) that the tensors depend on, each once, in the order of the walk."""
    leaves: list[Tensor] = []
    roots: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            roots.append(tensor.grad_fn)
        elif tensor.requires_grad:
            leaves.append(tensor)
    known = {id(leaf) for leaf in leaves}
    for node in nodes_behind(roots, stop):
        variable = getattr(node, "variable", None)  # of the node that accumulates into a leaf
        if isinstance(variable, Tensor) and id(variable) not in known:
            known.add(id(variable))
            leaves.append(variable)
    return leaves
