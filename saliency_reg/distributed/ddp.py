"""What ``DistributedDataParallel`` does not allow: gradients of outputs or losses before the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..errors import ConfigurationError
from ..torch_tools import DDP_SINK, nodes_behind


class StaticGraphCheck:
    """Refuses what came out of ``DistributedDataParallel(static_graph=True)``.

    With a static graph, the first gradient that comes along counts as the backward pass, and is reduced before it is whole.
    """

    def __init__(self) -> None:
        self._passed = False

    def check(self, tensors: Iterable[Any]) -> None:
        """Look for it behind these outputs or losses, until it was not there once."""
        if self._passed:
            return
        for node in nodes_behind(tensor.grad_fn for tensor in tensors if isinstance(tensor, Tensor)):
            if node.name() == DDP_SINK and node.ddp_weakref().static_graph:  # type: ignore[attr-defined]
                raise ConfigurationError(
                    "DistributedDataParallel(static_graph=True) takes the gradient of these outputs or losses for its "
                    "backward pass, so that gradients would be wrong. Attach the regularizer to the model with "
                    "target='output', which takes the outputs from the heads, or pass static_graph=False."
                )
        self._passed = True
