"""Hooks around the steps of optimizers, and what is inside of their wrappers."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch

from ..errors import ConfigurationError, WrongTypeError
from .hooks import Handle, Hook, remove_all


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The innermost optimizer of wrappers that carry it as ``.optimizer``.

    Raises:
        WrongTypeError: no ``torch.optim.Optimizer`` inside.
    """
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
    """Refuse an optimizer that cannot step without a closure (LBFGS).

    Raises:
        ConfigurationError: it is one.
    """
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigurationError(
            f"{type(optimizer).__name__} evaluates a closure several times per step, and gradient surgery would give it "
            "another direction each time. Use an optimizer whose step() needs no closure, or leave surgery out."
        )


class StepHook:
    """A hook that calls ``method()`` after each step that the optimizer really took.

    A fused optimizer under GradScaler runs its step even when gradients overflowed, and skips the update inside;
    such a step does not count.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, method: Callable[[], Any]) -> None:
        self._step = weakref.WeakMethod(method)
        self._handle: Handle = optimizer.register_step_post_hook(Hook(self._after_step))
        finalizer = weakref.finalize(self, self._handle.remove)
        finalizer.atexit = False

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        skipped = found_inf is not None and bool(torch.as_tensor(found_inf).any())
        method = self._step()
        if method is not None and not skipped:
            method()


class StepGuard:
    """Calls ``before()``, which may raise, and ``after()`` around each step. A step with a closure has no ``before()``."""

    def __init__(self, optimizer: torch.optim.Optimizer, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._before = weakref.WeakMethod(before)
        self._after = weakref.WeakMethod(after)
        self._handles: list[Handle] = [
            optimizer.register_step_pre_hook(Hook(self._before_step)),
            optimizer.register_step_post_hook(Hook(self._after_step)),
        ]
        finalizer = weakref.finalize(self, remove_all, self._handles, [])
        finalizer.atexit = False

    def remove(self) -> None:
        """Take the hooks off."""
        remove_all(self._handles, [])

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        method = self._before()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # the first is the optimizer
        if method is not None and closure is None:
            method()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        method = self._after()
        if method is not None:
            method()
