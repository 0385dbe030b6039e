"""BatchNorm in train mode, differentiated as if the batch's statistics were constants: a sample's saliency is its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..capture import CapturedForward
from ..torch_tools import Edge, Gradient, at_least_float32, nodes_between, recomputing, version_of

#: Heads, each with the modes (train or eval) that it and its parts were in.
HeadsNow = frozenset[tuple[int, tuple[bool, ...]]]


def heads_as_they_are(forward: CapturedForward) -> HeadsNow:
    """Return the heads that ran, each with the modes of its parts now."""
    modules = forward.modules
    return frozenset(
        (index, tuple(module.training for module in modules[index].modules()) if modules else ())
        for index in forward.ran
    )


@contextmanager
def fixed_statistics(
    outputs: Sequence[Tensor], features: Sequence[Edge], modules: Sequence[nn.Module] = ()
) -> Iterator[bool]:
    """Within, gradients pass each BatchNorm between ``features`` and ``outputs`` as they pass one in eval mode.

    Nothing runs again (but ``modules`` in a checkpoint, whose buffers are put back): a hook on the node of the forward puts
    ``gradient * weight / std`` in the place of its gradient, and is gone afterwards, so that the gradients of the losses are
    what they were. ``std`` stays a function of the batch: what is differentiated a second time is the saliency as it is
    defined here. Yields whether there is such a layer.
    """
    behind = [node for node in nodes_between(outputs, features) if getattr(node, "_saved_training", False)]
    with _kept_buffers(modules if behind else ()):
        with recomputing():
            found = [(node, _FixedStatistics(node)) for node in behind if _has_batch_statistics(node)]
        handles = [node.register_hook(one.passed) for node, one in found]
        try:
            yield bool(handles)
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _kept_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    norms = [part for module in modules for part in module.modules() if isinstance(part, _BatchNorm)]
    before = [
        (norm.num_batches_tracked, version_of(norm.num_batches_tracked), [one.clone() for one in norm.buffers()], norm)
        for norm in norms
        if norm.num_batches_tracked is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for count, version, values, norm in before:
                if version_of(count) != version:  # the version of the others does not tell
                    for buffer, value in zip(norm.buffers(), values):
                        buffer.copy_(value)


def _has_batch_statistics(node: Any) -> bool:
    # NativeBatchNormBackward0, and those of cuDNN and MIOpen.
    return "BatchNormBackward" in node.name() and not _is_of_an_instance_norm(node)


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
        weight = getattr(node.next_functions[1][0], "variable", None)
        self._weight: Tensor | None = node._saved_weight if weight is None else weight
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
