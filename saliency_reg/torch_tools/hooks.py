"""The one place where hooks are set on other people's modules and optimizers, and taken off again.

What is set here does not keep its owner alive (unless it is told to), is removed when the owner is garbage collected, and
does not travel: a deep copy or a pickle of a hooked module is a clean module.
"""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import ConfigurationError, WrongTypeError

__all__ = [
    "ModuleHooks",
    "StepGuard",
    "StepHook",
    "check_not_closure_only",
    "is_hooked",
    "only_ours",
    "unwrap_optimizer",
]

_FORWARD_HOOKS = "_forward_hooks"
_PRE_HOOKS = "_forward_pre_hooks"
# nn.Module keeps the ids of hooks with special calling conventions in tables beside these two.
_SIDE_TABLES = {
    _PRE_HOOKS: ("_forward_pre_hooks_with_kwargs",),
    _FORWARD_HOOKS: ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


class _Handle(Protocol):
    def remove(self) -> None: ...


class _Hook:
    """Calls a method of an object that it does not keep alive, unless it is told to."""

    def __init__(self, method: Callable[..., Any], *bound: Any, keep: bool = False) -> None:
        self._method: Callable[[], Callable[..., Any] | None] = (lambda: method) if keep else weakref.WeakMethod(method)
        self._bound = bound

    def __call__(self, *args: Any) -> Any:
        method = self._method()
        return None if method is None else method(*self._bound, *args)

    def __reduce__(self) -> Any:
        # Only reached for modules that copy their hooks in a way of their own: the copy gets one without effect.
        return _inert, ()


def _inert() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*args: Any) -> None:
    return None


class _CleanState:
    """Stands in for a hooked module's ``__getstate__``, which ``copy`` and ``pickle`` ask: its state without us."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self) -> Any:
        module = self._module()
        own = getattr(type(module), "__getstate__", None)
        if own is not None and own is not getattr(object, "__getstate__", None):
            state = own(module)
        else:
            state = vars(module).copy()
        if not isinstance(state, dict):
            return state
        state = {name: value for name, value in state.items() if name != "__getstate__"}
        for table, side_tables in _SIDE_TABLES.items():
            hooks = state.get(table) or {}
            ours = {key for key, hook in hooks.items() if isinstance(hook, _Hook)}
            for name in (table, *side_tables):
                if name in state:
                    state[name] = OrderedDict((key, value) for key, value in state[name].items() if key not in ours)
        return state


class ModuleHooks:
    """The hooks that one owner has set on modules.

    Args:
        owner: the object whose methods are called. When it is garbage collected, the hooks go too.
        keep: let the modules keep the owner alive, for an owner that nobody has to call.
    """

    def __init__(self, owner: object, keep: bool = False) -> None:
        self._keep = keep
        self._handles: list[_Handle] = []
        self._modules: list[weakref.ref[nn.Module]] = []
        # The finalizer must not refer to the owner, so it is given the lists and a function outside of it.
        finalizer = weakref.finalize(owner, _remove_all, self._handles, self._modules)
        finalizer.atexit = False

    def before(self, module: nn.Module, method: Callable[..., Any], *bound: Any, first: bool = False) -> None:
        """Call ``method(*bound, module, args, kwargs)`` before each forward; with ``first``, before the hooks of others."""
        self._note(module)
        hook = _Hook(method, *bound, keep=self._keep)
        self._handles.append(module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True))

    def after(self, module: nn.Module, method: Callable[..., Any], *bound: Any, always: bool = False) -> None:
        """Call ``method(*bound, module, args, output)`` after each forward; with ``always``, also when it raised."""
        self._note(module)
        self._handles.append(module.register_forward_hook(_Hook(method, *bound, keep=self._keep), always_call=always))

    def remove(self) -> None:
        """Take all of them off. Nothing of ours is left on the modules."""
        _remove_all(self._handles, self._modules)

    def _note(self, module: nn.Module) -> None:
        self._modules.append(weakref.ref(module))
        vars(module)["__getstate__"] = _CleanState(module)


def _remove_all(handles: list[_Handle], modules: list[weakref.ref[nn.Module]]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
    for reference in modules:
        module = reference()
        if module is not None and not is_hooked(module) and isinstance(vars(module).get("__getstate__"), _CleanState):
            del vars(module)["__getstate__"]
    modules.clear()


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook of this package is on the module."""
    return any(isinstance(hook, _Hook) for table in _SIDE_TABLES for hook in vars(module)[table].values())


def only_ours(module: nn.Module) -> bool:
    """Whether the module has no forward hooks but those of this package."""
    return all(isinstance(hook, _Hook) for table in _SIDE_TABLES for hook in vars(module)[table].values())


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
        self._handle: _Handle = optimizer.register_step_post_hook(_Hook(self._after_step))
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
        self._handles: list[_Handle] = [
            optimizer.register_step_pre_hook(_Hook(self._before_step)),
            optimizer.register_step_post_hook(_Hook(self._after_step)),
        ]
        finalizer = weakref.finalize(self, _remove_all, self._handles, [])
        finalizer.atexit = False

    def remove(self) -> None:
        """Take the hooks off."""
        _remove_all(self._handles, [])

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        method = self._before()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # the first is the optimizer
        if method is not None and closure is None:
            method()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        method = self._after()
        if method is not None:
            method()
