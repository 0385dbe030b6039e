"""Where a tensor is in the graph, whatever is done to it in place later on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ..errors import CaptureError
from ..torch_tools import Edge, edge_of, same_tensor, version_of

_MOST_ON_THE_WAY = 8


@dataclass(eq=False)
class Place:
    """A tensor as it was when it was noted.

    Autograd gives a view another node as soon as its memory is written to, and may leave the first one out; what it is a
    view of keeps its node.
    """

    tensor: Tensor
    edge: Edge | None
    version: int
    base: Tensor | None  # what it is a view of
    base_edge: Edge | None
    made_by: nn.Module | None = None  # whose output it is

    @classmethod
    def of(cls, tensor: Tensor, made_by: nn.Module | None = None) -> Place:
        base = tensor._base if tensor.requires_grad else None
        base_edge = None if base is None else edge_of(base)
        return cls(tensor, edge_of(tensor), version_of(tensor), base, base_edge, made_by)

    def differentiable(self) -> tuple[Edge | None, Callable[[Tensor], Tensor] | None]:
        """Return where to take the gradient, and what makes that of the tensor out of it, if it is of a larger one."""
        if self.base is None or self.base_edge is None or version_of(self.tensor) == self.version:
            return self.edge, None
        return self.base_edge, _entries(self.tensor, self.base)


def _entries(view: Tensor, base: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what picks, out of a gradient of the base, that of its view."""
    strides = base.stride()
    order = sorted(range(base.ndim), key=strides.__getitem__, reverse=True)
    if view.dtype != base.dtype or not base.permute(order).is_contiguous():
        raise CaptureError(
            f"the feature map {list(view.shape)} is a view that was changed in place, of a {base.dtype} tensor whose "
            "entries do not lie side by side. Use the operation that makes a new tensor, or feature.clone() before it."
        )
    shape, stride, start = view.shape, view.stride(), view.storage_offset() - base.storage_offset()

    def pick(gradient: Tensor) -> Tensor:
        laid_out = gradient.permute(order).contiguous()
        return laid_out.as_strided(shape, stride, laid_out.storage_offset() + start)

    return pick


def as_edge(edge: Edge) -> tuple[Node, int]:
    """Return the node and the number of its output."""
    found = edge if isinstance(edge, GradientEdge) else get_gradient_edge(edge)
    return found.node, found.output_nr


def read_elsewhere(edge: Edge, aliases: Sequence[Edge | None], outputs: Sequence[Tensor]) -> bool:
    """Whether outputs depend on the place of a tensor on another way than through the aliases of it."""
    place, seen = as_edge(edge), {as_edge(alias) for alias in aliases if alias is not None}
    waiting = [(output.grad_fn, output.output_nr) for output in outputs]
    while waiting:
        node, output_nr = waiting.pop()
        # Of a node with an input for every so many outputs, such as a fork, only that one is behind an output.
        apart = getattr(node, "inputs_apart", 0)
        if node is None or (at := (node, output_nr if apart or (node, output_nr) in seen else -1)) in seen:
            continue
        seen.add(at)
        behind = node.next_functions[output_nr % apart :][:1] if apart else node.next_functions
        if place in behind:
            return True
        waiting += behind
    return False


#: Nodes of one argument, and with a gradient that is a view too.
_PLAIN_VIEW = re.compile(
    "(Alias|Permute|ReshapeAlias|Squeeze|T|Transpose|UnsafeView|Unsqueeze|View)Backward0|SqueezeBackward[12]"
)


def is_plainly(tensor: Tensor, other: Tensor) -> bool:
    """Whether one can stand for the other: the same entries, without anything in between that changes a gradient.

    A view of the same memory is not enough: gradient reversal is ``x.view_as(x)`` with a backward of its own.
    """
    if tensor is other:
        return True
    if not same_tensor(tensor, other) or tensor._backward_hooks or other._backward_hooks:
        return False
    behind = _behind_views(tensor)
    return behind is not None and behind == _behind_views(other)


def _behind_views(tensor: Tensor) -> tuple[Any, int] | None:
    """Return the node and output that a tensor is a plain view of; ``None`` for one without a graph."""
    if tensor.grad_fn is None:
        return (id(tensor), 0) if tensor.requires_grad else None
    node, output = tensor.grad_fn, tensor.output_nr
    while _PLAIN_VIEW.fullmatch(node.name()) and node.next_functions[0][0] is not None:
        node, output = node.next_functions[0]  # type: ignore[assignment]
    variable = getattr(node, "variable", None)
    return (node, output) if variable is None else (id(variable), 0)


def is_turned(tensor: Tensor, other: Tensor) -> bool:
    """Whether a backward of somebody's own or a hook is between two tensors with the same entries."""
    if tensor is other:
        return False
    ways = [_single_way(one) for one in (tensor, other)]
    meet = next(((i, ways[1].index(node)) for i, node in enumerate(ways[0]) if node in ways[1]), (None, None))
    apart = [node for way, end in zip(ways, meet) for node in way[:end]]
    return bool(tensor._backward_hooks or other._backward_hooks) or any(
        isinstance(node, BackwardCFunction) for node in apart
    )


def _single_way(tensor: Tensor) -> list[Any]:
    """Return the first nodes behind a tensor, up to one that takes several tensors."""
    way: list[Any] = []
    node = tensor.grad_fn
    while node is not None and len(way) < _MOST_ON_THE_WAY:
        way.append(node)
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return way
