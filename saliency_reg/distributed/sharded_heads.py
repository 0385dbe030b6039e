"""Models whose parameters FSDP2 (``fully_shard``) has split over the processes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from ..errors import ConfigurationError
from ..torch_tools import derives_from


def is_sharded(module: nn.Module) -> bool:
    """Tell whether ``fully_shard`` was called on this module."""
    return derives_from(module, "FSDPModule")


class ShardedHeads:
    """Keeps the parameters of heads whole from the saliency to the backward pass.

    FSDP2 frees them as soon as a gradient has come through a head. The saliency is such a gradient, and the backward pass
    of the penalty goes through the head before FSDP2 gathers its parameters again.
    """

    def __init__(self, model: nn.Module, heads: Sequence[nn.Module]) -> None:
        self._model = weakref.ref(model)
        self._heads = heads
        self._sharded: list[weakref.ref[nn.Module]] | None = None
        self._owners: list[weakref.ref[nn.Module]] = []
        self._gathered = False

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Make the parameters of all heads whole, and let nothing free them within; they stay until a backward pass.

        All processes gather once, here: how many gradients are taken within is decided by each for itself.
        """
        if self._sharded is None:  # sharding may come after attaching, but not after the first forward
            self._find()
        groups = [group for module in self._all(self._sharded or ()) for group in _parameter_groups(module)]
        if not groups:
            yield
            return
        before = [group.reshard_after_backward for group in groups]
        for group in groups:
            group.reshard_after_backward = False
        try:
            for owner in self._all(self._owners):
                cast("Any", owner).unshard()
            yield
        finally:
            for group, value in zip(groups, before):
                group.reshard_after_backward = value
            self._gathered = True

    def release(self) -> None:
        """Before a forward: free what no backward pass has freed, or it would miss what an optimizer did since."""
        if self._gathered:
            self._gathered = False
            for module in self._all(self._sharded or ()):
                cast("Any", module).reshard()

    @staticmethod
    def _all(references: Sequence[weakref.ref[nn.Module]]) -> list[nn.Module]:
        return [module for reference in references if (module := reference()) is not None]

    def _find(self) -> None:
        """Find the sharded modules; those inside of heads and around them own the heads' parameters.

        The order is the same on all processes, which gather together.
        """
        model = self._model()
        inside = dict.fromkeys(part for head in self._heads for part in head.modules())
        everything = dict.fromkeys([*(() if model is None else model.modules()), *inside])
        owners = [m for m in everything if m in inside or not set(self._heads).isdisjoint(m.modules())]
        if any(derives_from(module, "FullyShardedDataParallel") for module in owners):
            raise ConfigurationError(
                "the heads are in a FullyShardedDataParallel (FSDP1), which frees their parameters before the second "
                "derivative. Use FSDP2: fully_shard(model), with accelerate FullyShardedDataParallelPlugin(fsdp_version=2); "
                "or wrap the backbone only."
            )
        self._sharded = [weakref.ref(module) for module in everything if is_sharded(module)]
        self._owners = [weakref.ref(module) for module in owners if is_sharded(module)]


def _parameter_groups(module: nn.Module) -> list[Any]:
    # There is a public setter of what is changed here, but nothing that tells what it was.
    state = cast("Any", module)._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]
