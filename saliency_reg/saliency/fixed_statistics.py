"""BatchNorm in train mode, differentiated as if the batch's statistics were constants: a sample's saliency is its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..capture import CapturedForward
from ..torch_tools import Edge, Gradient, at_least_float32, nodes_between

#: Heads, each with the modes (train or eval) that it and its parts were in.
HeadsNow = frozenset[tuple[int, tuple[bool, ...]]]


def heads_as_they_are(forward: CapturedForward) -> HeadsNow:
    modules = forward.modules
    return frozenset(
        (index, tuple(module.training for module in modules[index].modules()) if modules else ())
        for index in forward.ran
    )


@contextmanager
def fixed_statistics(outputs: Sequence[Tensor], features: Sequence[Edge]) -> Iterator[bool]:
    """Within, gradients pass each BatchNorm between ``features`` and ``outputs`` as they pass one in eval mode.

    Nothing runs again: a hook on the node of the forward puts ``gradient * weight / std`` in the place of its gradient, and
    is gone afterwards, so that the gradients of the losses are what they were. ``std`` stays a function of the batch: what
    is differentiated a second time is the saliency as it is defined here. Yields whether there is such a layer.
    """
    behind = nodes_between(outputs, features)
    handles = [node.register_hook(_FixedStatistics(node).passed) for node in behind if _has_batch_statistics(node)]
    try:
        yield bool(handles)
    finally:
        for handle in handles:
            handle.remove()


def _has_batch_statistics(node: Any) -> bool:
    # NativeBatchNormBackward0, and those of cuDNN and MIOpen.
    return (
        "BatchNormBackward" in node.name()
        and getattr(node, "_saved_training", False)
        and not _is_of_an_instance_norm(node)
    )


def _is_of_an_instance_norm(node: Any) -> bool:
    """Tell a BatchNorm of one sample, ``[1, B*C, ...]``, which is a view of ``[B, C, ...]``."""
    viewed = list(getattr(node.next_functions[0][0], "_saved_self_sym_sizes", []))
    if len(viewed) < 3:
        return False
    own: Tensor = node._saved_input
    return len(own) == 1 and own.ndim == len(viewed) and bool(viewed[0] * viewed[1] == own.shape[1])


class _FixedStatistics:
    """The way of a gradient through one BatchNorm. What the node saved is read at once: a checkpoint gives it only once."""

    def __init__(self, node: Any) -> None:
        self._values: Tensor = node._saved_input
        self._weight: Tensor | None = node._saved_weight
        self._epsilon: float = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon

    def passed(self, gradients: Sequence[Gradient], arriving: Sequence[Gradient]) -> tuple[Gradient, ...] | None:
        gradient, own = arriving[0], gradients[0]
        if gradient is None or own is None:
            return None
        values = self._values.to(at_least_float32(self._values.dtype))
        factor = torch.rsqrt(values.var([0, *range(2, values.ndim)], correction=0) + self._epsilon)
        if self._weight is not None:
            factor = factor * self._weight
        return (gradient * factor.view(-1, *[1] * (values.ndim - 2))).to(own.dtype), *gradients[1:]
