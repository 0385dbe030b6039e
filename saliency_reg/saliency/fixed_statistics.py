"""BatchNorm in train mode, differentiated as if the batch's statistics were constants: a sample's saliency is its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
    handles = [node.register_hook(partial(_passed, node)) for node in behind if _has_batch_statistics(node)]
    try:
        yield bool(handles)
    finally:
        for handle in handles:
            handle.remove()


def _has_batch_statistics(node: Any) -> bool:
    # NativeBatchNormBackward0, and those of cuDNN and MIOpen.
    return "BatchNormBackward" in node.name() and getattr(node, "_saved_training", False)


def _passed(node: Any, gradients: Sequence[Gradient], arriving: Sequence[Gradient]) -> tuple[Gradient, ...] | None:
    gradient, own = arriving[0], gradients[0]
    if gradient is None or own is None or len(own) == 1:  # InstanceNorm is a BatchNorm of one sample
        return None
    values: Tensor = node._saved_input
    values = values.to(at_least_float32(values.dtype))
    epsilon = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    factor = torch.rsqrt(values.var([0, *range(2, values.ndim)], correction=0) + epsilon)
    if node._saved_weight is not None:
        factor = factor * node._saved_weight
    return (gradient * factor.view(-1, *[1] * (values.ndim - 2))).to(own.dtype), *gradients[1:]
