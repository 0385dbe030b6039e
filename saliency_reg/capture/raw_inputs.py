"""Inputs of the model, where the input of a module in it was named as the feature map."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..torch_tools import Edge, edge_of, leaves_behind, warn_user
from .aliases import HeadAliases
from .forward import CapturedForward
from .places import as_edge, read_elsewhere


class RawInputs:
    """Hands the model its inputs as tensors that require grad, where a named one is made of them that others read, too.

    The hook before one module cannot replace what others read. Whether they do is seen in the graph of the first forward;
    if not, the inputs are left alone after it, so that no graph is made of a frozen backbone.
    """

    def __init__(self, aliases: HeadAliases, active: bool) -> None:
        self._aliases = aliases
        self._active, self._decided = active, not active
        self._seen: dict[str, tuple[Edge, Edge]] = {}  # where a named input is, and the alias that its module reads
        self._told: set[str] = set()
        self._ran: set[int] = set()

    def replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments of the model; ``None`` to leave them."""
        self._seen.clear()
        return self._aliases.with_stand_ins(args, kwargs) if self._active else None

    def see(self, name: str, feature: Tensor) -> Tensor | None:
        """Look at a named input; return what its module is to read in place of it."""
        if not feature.requires_grad:
            if name not in self._told:
                self._told.add(name)
                warn_user(
                    f"the feature {name!r} does not require grad; if others read it than the module that was named, its "
                    "gradient lacks what leads through them. Name the module whose output it is, or call .requires_grad_() "
                    "on it before it is read."
                )
            return None
        own = {as_edge(edge) for edge in self._aliases.stand_in_edges()}
        if self._decided or not own or leaves_behind([feature], own):
            return None
        alias = feature.view_as(feature)
        edges = edge_of(feature), edge_of(alias)
        if edges[0] is not None and edges[1] is not None:
            self._seen[name] = edges[0], edges[1]
        return alias

    def look(self, forward: CapturedForward | None) -> None:
        """Decide, once all heads ran, whether the inputs have to require grad in the following forwards."""
        if self._decided or forward is None:
            return
        self._ran.update(forward.ran)
        needed = any(read_elsewhere(edge, [alias], forward.outputs) for edge, alias in self._seen.values())
        if needed or len(self._ran) == len(forward.modules):
            self._active, self._decided = needed, True
            self._told.update(self._seen)
            self._seen.clear()
