"""A regularizer that knows which positions of a feature map are padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import SaliencyRegularizer
from saliency_reg.hooks import ModuleHooks

__all__ = ["MaskSource", "MaskedRegularizer"]

#: From the attention mask and the feature map ``[B, L, C]`` to what is real in it, ``[B, L]``.
AsPositions = Callable[[Tensor, Tensor], "Tensor | None"]


class MaskSource:
    """Notes the mask that a module was last called with.

    Args:
        module: whose calls are looked at.
        name: of the argument.
        place: of the argument among those without a name, by default as its signature has it.
    """

    def __init__(self, module: nn.Module, name: str, place: int | None = None) -> None:
        self._name = name
        if place is None:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            place = names.index(name) if name in names else None
        self._place = place
        self.latest: Tensor | None = None
        self._hooks = ModuleHooks(self)
        self._hooks.before(module, self._before)

    def remove(self) -> None:
        """Take the hook off."""
        self._hooks.remove()
        self.latest = None

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        given = kwargs.get(self._name)
        if given is None and self._place is not None and len(args) > self._place:
            given = args[self._place]
        self.latest = given if isinstance(given, Tensor) else None


class MaskedRegularizer(SaliencyRegularizer):
    """A :class:`SaliencyRegularizer` that leaves padding out where its feature map has positions.

    ``mask=`` in a call still takes precedence.

    Args:
        model: as there.
        mask_from: ``(module, name of its argument, place)``: where the mask of each forward is seen.
        as_positions: from the mask and the feature map to the mask of its positions; by default it is that.
        options: as there.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mask_from: tuple[nn.Module, str, int | None],
        as_positions: AsPositions | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self._as_positions = as_positions
        self._mask_source: MaskSource | None = MaskSource(*mask_from)

    def remove(self) -> None:
        """Take everything off the model and the optimizer."""
        super().remove()
        if self._mask_source is not None:
            self._mask_source.remove()

    def _mask_of(self, feature: Tensor) -> Tensor | None:
        mask = None if self._mask_source is None else self._mask_source.latest
        if mask is None or feature.ndim != 3:
            return None
        if self._as_positions is not None:
            return self._as_positions(mask, feature)
        return mask.bool() if mask.shape == feature.shape[:2] else None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_mask_source": None, "_as_positions": None}
