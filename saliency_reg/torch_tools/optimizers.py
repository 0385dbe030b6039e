"""Hooks around the steps of optimizers, and the optimizers inside of wrappers."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigurationError, WrongTypeError
from .hooks import Hook, remove_all


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the innermost optimizer of wrappers that carry it as ``.optimizer``."""
    inner: Any = None if hasattr(optimizer, "get_last_lr") else optimizer  # a scheduler carries .optimizer, too
    for _ in range(8):  # wrappers of wrappers, but no endless chain
        if getattr(inner, "optimizer", None) is None:
            break
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise WrongTypeError(
            f"optimizer must be a torch.optim.Optimizer, or a wrapper with one as .optimizer; found "
            f"{type(optimizer).__name__}. In a loop without one, call regularizer.step() after each update."
        )
    return inner


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
