"""The tensor that each head is handed in place of the shared feature map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_tools import Edge, edge_of
from .forward import HeadRun
from .heads import Heads
from .nested import Item, first_tensor, put_argument


class HeadAliases:
    """Hands each head a view of its own (no copy), so that one autograd call returns the gradient of every head.

    Gradient surgery derives from this class: the capture calls these methods and knows nothing of what they do there.
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = heads
        #: Whether a penalty is taken. Without (its strength is 0), the model's graph is left exactly as it is.
        self.for_penalty = True

    @property
    def done(self) -> bool:
        """Whether a backward pass has been through the latest forward: a head that runs now begins another one."""
        return False

    def begin_forward(self, active: bool) -> None:
        """Note that a forward begins, with gradients if it is ``active``."""

    def end_forward(self) -> Any:
        """Return what the captured forward has to carry."""
        return None

    def forget(self) -> None:
        """Forget the latest forward."""

    def of_feature(self, index: int, feature: Tensor, *, recorded: bool) -> Tensor | None:
        """Return what takes the place of a named feature map; ``None`` for nothing.

        ``recorded`` is false where checkpointing recomputes it, which has to go the way that the forward went.
        """
        return self._requiring_grad(feature)

    def hand_out(
        self, head: int, args: tuple[Any, ...], kwargs: dict[str, Any], features: Sequence[Tensor], *, recorded: bool
    ) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Edge | None]:
        """Return the arguments of a head, with its alias in them if there is one, and where it reads in the graph.

        ``features`` are the named feature maps of this forward; ``recorded`` is as in :meth:`of_feature`.
        """
        path, source = first_tensor(args, kwargs)
        if source is None:
            return (args, kwargs), None
        alias = self._requiring_grad(source)
        if alias is None and self.for_penalty and source.requires_grad:
            alias = source.view_as(source)
        if alias is None:
            return (args, kwargs), edge_of(source)
        return put_argument(args, kwargs, path, alias), edge_of(alias)

    def after_head(self, head: int, returned: Any, run: HeadRun, items: Sequence[Item], feature: Tensor | None) -> Any:
        """Return what takes the place of all that a head ``returned``; ``None`` for nothing.

        ``items`` lead to the task's output in it, and ``feature`` is the first named feature map.
        """
        return None

    def _requiring_grad(self, tensor: Tensor) -> Tensor | None:
        """Return the same values as a tensor that requires grad, behind a frozen backbone, if any head can be trained."""
        if tensor.requires_grad:
            return None
        if not any(parameter.requires_grad for head in self.heads.modules for parameter in head.parameters()):
            return None
        alias: Tensor = _RequireGrad.apply(tensor, torch.empty(0, device=tensor.device, requires_grad=True))
        return alias


class _RequireGrad(torch.autograd.Function):
    """The identity, with an output that requires grad although the input does not. Nothing is accumulated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        # detach shares the memory without being a view to autograd: heads may work on it in place, as before.
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None  # nothing in front of here is trained
