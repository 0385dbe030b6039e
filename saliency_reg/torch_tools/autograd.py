"""Walks through the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["DDP_SINK", "leaves_behind", "leaves_behind_each", "nodes_behind"]

#: The node behind the outputs of DistributedDataParallel when it looks for unused parameters: each output has its own
#: input, and no other.
DDP_SINK = "_DDPSinkBackward"


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


def leaves_behind_each(tensors: Mapping[int, Tensor], visit: Callable[[Node], None]) -> dict[Tensor, int]:
    """The leaf tensors, each with the keys of the tensors that depend on it as a bit mask.

    One walk, however many tensors there are. ``visit`` is called once with each node.
    """
    masks: dict[_Place, int] = {}
    leaves: dict[Tensor, int] = {}
    for key, tensor in tensors.items():
        if tensor.grad_fn is not None:
            place = _place(tensor.grad_fn, tensor.output_nr)
            masks[place] = masks.get(place, 0) | 1 << key
        elif tensor.requires_grad:
            leaves[tensor] = leaves.get(tensor, 0) | 1 << key
    visited: set[Node] = set()
    for place, following in reversed(_leaves_first(masks)):
        if place[0] not in visited:
            visited.add(place[0])
            visit(place[0])
        variable = getattr(place[0], "variable", None)
        if isinstance(variable, Tensor):
            leaves[variable] = leaves.get(variable, 0) | masks[place]
        for behind in following:
            masks[behind] = masks.get(behind, 0) | masks[place]
    return leaves


#: A node, and the number of its output where that matters.
_Place = tuple[Node, int]


def _place(node: Node, output: int) -> _Place:
    return node, output if node.name() == DDP_SINK else 0


def _leaves_first(roots: Iterable[_Place]) -> list[tuple[_Place, list[_Place]]]:
    """Every place with those behind it, none before the ones that are behind it."""
    finished: list[tuple[_Place, list[_Place]]] = []
    seen: set[_Place] = set()
    waiting: list[tuple[_Place, list[_Place] | None]] = [(root, None) for root in roots]
    while waiting:
        place, following = waiting.pop()
        if following is not None:
            finished.append((place, following))
        elif place not in seen:
            seen.add(place)
            following = _behind(place)
            waiting.append((place, following))
            waiting += [(behind, None) for behind in following if behind not in seen]
    return finished


def _behind(place: _Place) -> list[_Place]:
    node, output = place
    edges = node.next_functions
    if node.name() == DDP_SINK and output < len(edges):
        edges = edges[output : output + 1]
    return [_place(following, number) for following, number in edges if following is not None]
