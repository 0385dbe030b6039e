"""Heads whose parameters FSDP2 (``fully_shard``) has split over the processes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

__all__ = ["ShardedHeads", "is_sharded"]


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this module."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


class ShardedHeads:
    """Keeps the parameters of heads whole from the saliency to the backward pass.

    FSDP2 frees them as soon as a gradient has come through a head. The saliency is such a gradient, and the backward pass
    of the penalty goes through the head before FSDP2 gathers its parameters again.

    Args:
        model: which holds the heads.
        heads: its heads.
    """

    def __init__(self, model: nn.Module, heads: Sequence[nn.Module]) -> None:
        self._model = weakref.ref(model)
        self._heads = [weakref.ref(head) for head in heads]
        self._owners: list[weakref.ref[nn.Module]] | None = None

    def gather(self) -> None:
        """Make the parameters of all heads whole; does nothing for those that are."""
        if self._owners is None:  # sharding may come after attaching, but not after the first forward
            self._owners = [weakref.ref(module) for module in self._find()]
        for reference in self._owners:
            owner = reference()
            if owner is not None:
                cast("Any", owner).unshard()

    def _find(self) -> list[nn.Module]:
        """Sharded modules inside of heads, and those around them, which may hold the heads' parameters.

        In the same order on all processes, which gather together.
        """
        model = self._model()
        heads = [head for reference in self._heads if (head := reference()) is not None]
        inside = [part for head in heads for part in head.modules() if is_sharded(part)]
        around = []
        if model is not None:
            around = [m for m in model.modules() if is_sharded(m) and not set(heads).isdisjoint(m.modules())]
        return list(dict.fromkeys([*inside, *around]))
