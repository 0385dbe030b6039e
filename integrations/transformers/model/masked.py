"""A regularizer that knows which positions of a feature map are padding."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .... import SaliencyRegularizer
from ....capture import CapturedForward
from ....torch_tools import ModuleHooks, in_backward

#: From the attention mask and the feature map ``[B, L, C]`` to what is real in it, ``[B, L]``.
AsPositions = Callable[[Tensor, Tensor], "Tensor | None"]
#: From a new task, and the choice of ``scalarize`` for all, to whether its head is on tokens, and its own choice.
OfNewTask = Callable[[str, Any], "tuple[bool, Any]"]


class MaskSource:
    """Notes the mask with which a module (or one of several around each other) was last called, until it is read."""

    def __init__(self, modules: Sequence[nn.Module], name: str) -> None:
        self._name = name
        self._latest: Tensor | None = None
        self._hooks = ModuleHooks(self)
        for module in dict.fromkeys(modules):
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            self._hooks.before(module, self._before, names.index(name) if name in names else None)

    def remove(self) -> None:
        """Take the hooks off, and forget the mask."""
        self._hooks.remove()
        self._latest = None

    def take(self) -> Tensor | None:
        """Return the mask of the latest forward and forget it."""
        latest, self._latest = self._latest, None
        return latest

    def _before(self, place: int | None, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.is_grad_enabled() or in_backward():
            return
        given = kwargs.get(self._name)
        if given is None and place is not None and len(args) > place:
            given = args[place]
        self._latest = given if isinstance(given, Tensor) else None


class MaskedRegularizer(SaliencyRegularizer):
    """A :class:`SaliencyRegularizer` that leaves padding out where its feature map has positions, unless a call has a mask.

    Args:
        model: as there.
        mask_from: ``(modules, name of their argument)``: where the mask of each forward is seen.
        tokens: tasks with an output for each token. At a feature of the user's choice, what they return at padding depends
            on real tokens, by attention, and must not count.
        as_positions: from the mask and the feature map to the mask of its positions; by default the mask itself.
    """

    #: Of the model that knows whether the head of a new task is on tokens, and how its output is scalarised.
    _of_new_task: weakref.WeakMethod[OfNewTask] | None = None
    _scalarize: Any = None
    in_a_copy: ClassVar[dict[str, Any]] = {
        "_mask_source": None,
        "_as_positions": None,
        "_of_new_task": None,
        "_scalarize": None,
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        mask_from: tuple[Sequence[nn.Module], str],
        tokens: Sequence[str] = (),
        as_positions: AsPositions | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self._as_positions = as_positions
        self._tokens = frozenset(tokens)
        self._mask_source: MaskSource | None = MaskSource(*mask_from)

    def ask_of_new_tasks(self, asked: OfNewTask, scalarize: Any) -> None:
        """Ask a method of the model about each new task, which is given the choice that was made for all."""
        self._of_new_task = weakref.WeakMethod(asked)
        if not callable(scalarize):
            self._scalarize = scalarize if isinstance(scalarize, str) else "auto"

    def add_task(self, name: str, head: Any = None, *, scalarize: Any = None, **options: Any) -> None:
        """Take one more task, with what the model says of its head; see :class:`SaliencyRegularizer`."""
        asked = None if self._of_new_task is None else self._of_new_task()
        on_tokens, chosen = (False, None) if asked is None else asked(name, self._scalarize)
        super().add_task(name, head, scalarize=chosen if scalarize is None else scalarize, **options)
        self._tokens |= {name} if on_tokens else set()

    def remove_task(self, name: str, **options: Any) -> None:
        """Let a task go; see :class:`SaliencyRegularizer`."""
        super().remove_task(name, **options)
        self._tokens -= {name}

    def remove(self) -> None:
        """Take everything off the model, also what notes its masks."""
        super().remove()
        if self._mask_source is not None:
            self._mask_source.remove()

    def prepare(self, forward: CapturedForward) -> Tensor | None:
        """Return what is real in the feature map; at a named one, leave out what heads on tokens return at padding."""
        mask = None if self._mask_source is None else self._mask_source.take()
        if mask is None:
            return None
        if self.feature_names:
            forward.outputs = [
                self._without_padding(output, mask) if self._is_on_tokens(head, output) else output
                for head, output in zip(forward.ran, forward.outputs)
            ]
        feature = forward.features[0].tensor
        if feature.ndim != 3:
            return None
        if self._as_positions is not None:
            return self._as_positions(mask, feature)
        return mask.bool() if mask.shape == feature.shape[:2] else None

    def _is_on_tokens(self, head: int, output: Tensor) -> bool:
        """Whether what a head returned has an entry for each token."""
        return self.tasks[head] in self._tokens

    def _without_padding(self, output: Tensor, mask: Tensor) -> Tensor:
        positions: Tensor | None = mask
        if self._as_positions is not None and output.ndim == 3:
            positions = self._as_positions(mask, output)
        if positions is None or output.shape[:2] != positions.shape:
            return output
        padding = ~positions.bool()
        return output.masked_fill(padding if output.ndim == 2 else padding.unsqueeze(2), 0.0)
