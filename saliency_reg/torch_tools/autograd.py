"""Gradients, and walks through the autograd graph. ``torch.autograd.grad`` is called here and nowhere else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Optional, Union

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Gradient = Optional[Tensor]
#: A tensor, or where it was in the graph before an in-place operation changed it.
Edge = Union[Tensor, GradientEdge]

#: The node behind the outputs of DistributedDataParallel when it looks for unused parameters: each output has its own
#: input, and no other.
DDP_SINK = "_DDPSinkBackward"
#: A node, and the number of its output where that matters: behind ``DDP_SINK``.
_Output = tuple[Node, int]


def gradients_of(
    outputs: Sequence[Tensor],
    inputs: Sequence[Edge],
    seeds: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    keep_graph: bool = True,
) -> tuple[Gradient, ...]:
    """Return the gradients of ``sum_i <seeds_i, outputs_i>`` at the inputs; ``None`` where no output depends on one."""
    return torch.autograd.grad(
        list(outputs),
        list(inputs),  # type: ignore[arg-type]  # edges are accepted, which older annotations do not say
        None if seeds is None else list(seeds),
        create_graph=create_graph,
        retain_graph=keep_graph,
        allow_unused=True,
    )


def added(*gradients: Gradient) -> Gradient:
    """Return their sum; ``None`` counts as zero."""
    found = [gradient for gradient in gradients if gradient is not None]
    if len(found) < 2 or torch.is_grad_enabled():
        return sum(found[1:], start=found[0]) if found else None
    total = found[0] + found[1]
    for gradient in found[2:]:
        total += gradient
    return total


def this_pass() -> int:
    """Return a number for the backward pass that is running, -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def in_backward() -> bool:
    """Tell whether a backward pass is running: modules that run now are recomputed for it (checkpointing)."""
    return bool(_RECOMPUTING) or this_pass() != -1


#: Has an entry while what a checkpoint saved is read outside of a backward pass, for which its modules run again.
_RECOMPUTING: list[None] = []


@contextmanager
def recomputing() -> Iterator[None]:
    """Within, modules that run are recomputed, as in a backward pass."""
    _RECOMPUTING.append(None)
    try:
        yield
    finally:
        _RECOMPUTING.pop()


def edge_of(tensor: Tensor) -> Edge | None:
    """Return where the tensor is in the graph now: an in-place operation later on does not change that."""
    if not tensor.requires_grad:
        return None
    return tensor if tensor.is_leaf else get_gradient_edge(tensor)


def version_of(tensor: Tensor) -> int:
    """Return the number of in-place changes so far."""
    return -1 if tensor.is_inference() else tensor._version


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Tell whether it is one tensor, or two views of the same entries (each head may flatten the map on its own)."""
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.device == b.device
    )


def nodes_behind(roots: Iterable[Node | None], stop: Collection[_Output] = ()) -> Iterator[Node]:
    """Yield each node once, from the roots towards the leaves; not by way of the outputs of nodes in ``stop``."""
    seen = set()
    waiting = [node for node in roots if node is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [edge[0] for edge in node.next_functions if edge[0] is not None and edge not in stop]


def nodes_between(tensors: Sequence[Tensor], places: Iterable[Edge]) -> Iterator[Node]:
    """Yield the nodes that the tensors come from, each once, up to these places in the graph."""
    edges = [place if isinstance(place, GradientEdge) else edge_of(place) for place in places]
    found = [get_gradient_edge(edge) if isinstance(edge, Tensor) else edge for edge in edges if edge is not None]
    stop = {(edge.node, edge.output_nr) for edge in found}
    return nodes_behind([one.grad_fn for one in tensors if (one.grad_fn, one.output_nr) not in stop], stop)


def leaves_behind(tensors: Sequence[Tensor], stop: Collection[_Output] = ()) -> list[Tensor]:
    """Return the leaf tensors (parameters, mostly) that the tensors depend on, each once, in the order of the walk."""
    leaves = {tensor: None for tensor in tensors if tensor.requires_grad and tensor.grad_fn is None}
    roots = [tensor.grad_fn for tensor in tensors if (tensor.grad_fn, tensor.output_nr) not in stop]
    for node in nodes_behind(roots, stop):
        if (leaf := _leaf_of(node)) is not None:
            leaves[leaf] = None
    return list(leaves)


def leaves_behind_each(tensors: Mapping[int, Tensor], visit: Callable[[Node], None]) -> dict[Tensor, int]:
    """Return the leaf tensors, each with the keys of the tensors that depend on it as a bit mask.

    One walk, however many tensors there are, which calls ``visit`` with the nodes on its way.
    """
    masks: dict[_Output, int] = defaultdict(int)
    leaves: dict[Tensor, int] = defaultdict(int)
    for key, tensor in tensors.items():
        if tensor.grad_fn is not None:
            masks[_output_of(tensor.grad_fn, tensor.output_nr)] |= 1 << key
        elif tensor.requires_grad:
            leaves[tensor] |= 1 << key
    for at, following in reversed(_leaves_first(masks)):
        visit(at[0])
        if (leaf := _leaf_of(at[0])) is not None:
            leaves[leaf] |= masks[at]
        for behind in following:
            masks[behind] |= masks[at]
    return dict(leaves)


def _leaf_of(node: Node) -> Tensor | None:
    variable = getattr(node, "variable", None)  # of a node that accumulates into a leaf
    return variable if isinstance(variable, Tensor) else None


def _leaves_first(roots: Iterable[_Output]) -> list[tuple[_Output, list[_Output]]]:
    """Return every output with those behind it, none before the ones that are behind it."""
    finished: list[tuple[_Output, list[_Output]]] = []
    seen: set[_Output] = set()
    waiting: list[tuple[_Output, list[_Output] | None]] = [(root, None) for root in roots]
    while waiting:
        at, following = waiting.pop()
        if following is not None:
            finished.append((at, following))
        elif at not in seen:
            seen.add(at)
            following = _behind(*at)
            waiting.append((at, following))
            waiting += [(behind, None) for behind in following if behind not in seen]
    return finished


def _behind(node: Node, output: int) -> list[_Output]:
    edges = node.next_functions
    if node.name() == DDP_SINK and output < len(edges):
        edges = edges[output : output + 1]
    return [_output_of(following, number) for following, number in edges if following is not None]


def _output_of(node: Node, number: int) -> _Output:
    return node, number if node.name() == DDP_SINK else 0
