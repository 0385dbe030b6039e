"""What a forward keeps of its fork: the aliases of the tensors that all heads read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...capture.forward import Cut, place_in_graph, same_tensor, version_of
from ...regularizer.reach import is_plain_linear
from ...saliency.task_saliencies import Feature, resolve_channel_axis
from .columns import axis_of_columns, tap_columns
from .combiner import ForkSurgery
from .fork import fork

__all__ = ["ForkedForward", "tensor_places"]


class ForkedForward:
    """The aliases of one forward, and their places in the graph.

    Args:
        surgery: weighs the gradients.
        sources: the tensors that all heads read.
        heads: number of heads.
    """

    def __init__(self, surgery: ForkSurgery, sources: Sequence[Tensor], heads: int) -> None:
        self.sources = list(sources)
        self.versions = [version_of(source) for source in sources]
        self._aliases, self._anchors, self.fork = fork(surgery, sources, heads)
        self._edges: list[list[Feature]] = [
            [place for alias in own if (place := place_in_graph(alias)) is not None] for own in self._aliases
        ]

    @property
    def done(self) -> bool:
        """Whether a backward pass was here."""
        return self.fork.done

    def reads_the_same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors of the fork."""
        return len(tensors) == len(self.sources) and all(map(is_plainly, tensors, self.sources))

    @property
    def changed_in_place(self) -> bool:
        """Whether a head has written into what the others read."""
        return self.versions != [version_of(source) for source in self.sources]

    def aliases(self, head: int) -> list[Tensor]:
        """One alias of each tensor."""
        return self._aliases[head]

    def cuts(self) -> list[Cut]:
        """For each tensor: where heads read it, and where a gradient gets in that bypasses the surgery."""
        return [
            Cut([own[source] for own in self._edges], anchor)  # type: ignore[misc]
            for source, anchor in enumerate(self._anchors)
        ]

    def watch(self, output: Tensor, task: int) -> Tensor:
        """The output of a head with one number per sample, watched for its gradient; any other as it is."""
        if output.numel() != len(self.sources[0]) or len(self.sources) > 1:
            return output
        return self.fork.watch(task, output)

    def tap(
        self,
        output: Tensor,
        head: nn.Module,
        num_tasks: int,
        whole: bool,
        feature_shape: torch.Size,
        channel_axis: int | None,
    ) -> Tensor:
        """The output of a head with a column per task, watched for the gradient of each column."""
        axis = axis_of_columns(output, num_tasks, feature_shape, resolve_channel_axis(feature_shape, channel_axis))
        linear_axis = axis == output.ndim - 1
        plain = (
            whole and linear_axis and isinstance(head, nn.Linear) and is_plain_linear(head) and len(self.sources) == 1
        )
        return tap_columns(self.fork, output, axis, self._edges[0], head if plain else None)  # type: ignore[arg-type]


def is_plainly(tensor: Tensor, other: Tensor) -> bool:
    """Whether one can stand for the other: the same entries, without anything in between that changes a gradient.

    A view of the same memory is not enough: gradient reversal is ``x.view_as(x)`` with a backward of its own.
    """
    if tensor is other:
        return True
    return (
        same_tensor(tensor, other)
        and not tensor._backward_hooks
        and not other._backward_hooks
        and _behind_views(tensor) is not None
        and _behind_views(tensor) == _behind_views(other)
    )


def _behind_views(tensor: Tensor) -> tuple[Any, int] | None:
    """Node and output that a tensor is a plain view of; ``None`` for one without a graph."""
    if tensor.grad_fn is None:
        return (id(tensor), 0) if tensor.requires_grad else None
    node, output = tensor.grad_fn, tensor.output_nr
    while node.name() in _PLAIN_VIEWS and node.next_functions[0][0] is not None:
        node, output = node.next_functions[0]  # type: ignore[assignment]
    variable = getattr(node, "variable", None)
    return (node, output) if variable is None else (id(variable), 0)


#: Of one argument, and with a gradient that is a view too.
_PLAIN_VIEWS = {
    "AliasBackward0",
    "PermuteBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "TBackward0",
    "TransposeBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}


def tensor_places(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[tuple[int | str, ...], Tensor]]:
    """All floating-point tensors among the arguments, inside of lists, tuples and mappings too, and the ways to them."""
    waiting: list[tuple[tuple[int | str, ...], Any]] = [
        *(((place,), value) for place, value in enumerate(args)),
        *(((name,), value) for name, value in kwargs.items()),
    ]
    for way, value in waiting:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield way, value
        elif isinstance(value, Mapping):
            waiting += [((*way, key), part) for key, part in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [((*way, index), part) for index, part in enumerate(value)]
