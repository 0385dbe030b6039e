"""Hooks around the steps of optimizers, and the optimizers inside of wrappers and of other optimizers."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigurationError, WrongTypeError
from .hooks import Hook, remove_all

#: Where wrappers carry an optimizer that is not among their own attributes.
_PROPERTIES = ("optimizer", "optim", "base_optimizer")


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the innermost optimizer of wrappers that carry one: as ``.optimizer``, ``.optim``, ``.base_optimizer``, ...

    It is the one that changes the parameters: a wrapper may have another method for that than ``step``.
    """
    inner: Any = None if hasattr(optimizer, "get_last_lr") else optimizer  # a scheduler carries .optimizer, too
    for _ in range(8):  # wrappers of wrappers, but no endless chain
        carried = _carried_by(inner)
        if len(carried) != 1:
            break
        inner = carried[0]
    if not isinstance(inner, torch.optim.Optimizer):
        raise WrongTypeError(
            f"optimizer must be a torch.optim.Optimizer, or a wrapper with one as .optimizer; found "
            f"{type(optimizer).__name__}. In a loop without one, call regularizer.step() after each update."
        )
    if not hasattr(inner, "_optimizer_step_post_hooks"):
        raise WrongTypeError(
            f"{type(inner).__name__} derives from torch.optim.Optimizer, but has none of its hooks on steps, as it did not "
            "call its __init__. Pass the optimizer inside of it, or leave optimizer= out and call regularizer.step() after "
            "each update."
        )
    return inner


def _carried_by(wrapper: Any) -> list[Any]:
    """Return what a wrapper may hold on to as the optimizer; of several, nobody knows which counts."""
    own = getattr(wrapper, "__dict__", {}).values()
    found = {id(one): one for one in own if isinstance(one, torch.optim.Optimizer) and one is not wrapper}
    if not found:
        named = (getattr(wrapper, name, None) for name in _PROPERTIES)
        return [one for one in named if one is not None and one is not wrapper][:1]
    return list(found.values())


def check_not_closure_only(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that cannot step without a closure (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigurationError(
            f"{type(optimizer).__name__} evaluates a closure several times per step, and gradient surgery would give it "
            "another direction each time. Use an optimizer whose step() needs no closure, or leave surgery out."
        )


class StepGuard:
    """Calls ``before()``, which may raise, and ``after()`` around each step. A step with a closure has no ``before()``.

    It does not keep the owner of these methods alive, and takes its hooks off when it is garbage collected.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, before: Callable[[], Any] | None, after: Callable[[], Any]
    ) -> None:
        self._handles: list[RemovableHandle] = []
        if before is not None:
            self._handles.append(optimizer.register_step_pre_hook(Hook(self._before_step, Hook(before))))
        self._handles.append(optimizer.register_step_post_hook(Hook(self._after_step, Hook(after))))
        weakref.finalize(self, remove_all, self._handles, []).atexit = False

    def remove(self) -> None:
        remove_all(self._handles, [])

    def _before_step(self, before: Hook, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # the first is the optimizer
        if closure is None:
            before()

    def _after_step(self, after: Hook, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        after()


class StepHook(StepGuard):
    """Calls ``method()`` after each step that the optimizer really took.

    A fused optimizer under GradScaler runs its step even when gradients overflowed, and skips the update inside;
    such a step does not count.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, method: Callable[[], Any]) -> None:
        super().__init__(optimizer, None, method)

    def _after_step(self, after: Hook, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(torch.as_tensor(found_inf).any()):
            after()
