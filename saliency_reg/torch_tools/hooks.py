"""Hooks on other people's modules that last: the one place that sets them and takes them off; optimizer hooks build on it.

A hook does not keep its owner alive (unless it is told to), is removed when the owner is garbage collected, and does not
travel: a deep copy or a pickle of a hooked module is a clean module.
"""

from __future__ import annotations

import copyreg
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

#: nn.Module keeps the ids of hooks with special calling conventions in tables beside these two.
_SIDE_TABLES = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}


class Hook:
    """Calls a method of an object that it does not keep alive, unless ``keep`` is set."""

    def __init__(self, method: Callable[..., Any], *bound: Any, keep: bool = False) -> None:
        self._method: Callable[[], Callable[..., Any] | None] = (lambda: method) if keep else weakref.WeakMethod(method)
        self._bound = bound

    @property
    def owner(self) -> object:
        """Return the object whose method is called; ``None`` when it is gone."""
        return getattr(self._method(), "__self__", None)

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


#: How many hooks are on modules of a class, whose instances are then copied and pickled by :func:`_reduced`.
_HOOKED_CLASSES: Counter[type[nn.Module]] = Counter()


def _reduced(module: nn.Module) -> Any:
    """Tell ``copy`` and ``pickle`` what a module of a hooked class consists of: all but our hooks, on whichever object."""
    reduced = module.__reduce_ex__(4)
    if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    state = dict(reduced[2])
    for table, side_tables in _SIDE_TABLES.items():
        hooks = (state.get(table) or {}).items()
        ours = {key for key, hook in hooks if isinstance(hook, Hook) or hook is _do_nothing}
        for name in (table, *side_tables) if ours else ():
            if name in state:
                state[name] = OrderedDict((key, value) for key, value in state[name].items() if key not in ours)
    return (*reduced[:2], state, *reduced[3:])


class ModuleHooks:
    """Sets hooks on modules that call methods of their owner. When the owner is garbage collected, the hooks go too.

    With ``keep`` the modules keep the owner alive, for an owner that nobody has to call.
    """

    def __init__(self, owner: object, keep: bool = False) -> None:
        self._keep = keep
        self._handles: list[RemovableHandle] = []
        self._classes: list[type[nn.Module]] = []
        # The finalizer must not refer to the owner, so it is given the lists and a function outside of it.
        weakref.finalize(owner, remove_all, self._handles, self._classes).atexit = False

    def before(self, module: nn.Module, method: Callable[..., Any], *bound: Any, first: bool = False) -> None:
        """Call ``method(*bound, module, args, kwargs)`` before each forward; with ``first``, before the hooks of others."""
        self._note(module)
        hook = Hook(method, *bound, keep=self._keep)
        self._handles.append(module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True))

    def after(self, module: nn.Module, method: Callable[..., Any], *bound: Any, always: bool = False) -> None:
        """Call ``method(*bound, module, args, output)`` after each forward; with ``always``, also when it raised."""
        self._note(module)
        self._handles.append(module.register_forward_hook(Hook(method, *bound, keep=self._keep), always_call=always))

    def remove(self) -> None:
        remove_all(self._handles, self._classes)

    def _note(self, module: nn.Module) -> None:
        kind = type(module)
        self._classes.append(kind)
        _HOOKED_CLASSES[kind] += 1
        copyreg.dispatch_table.setdefault(kind, _reduced)


def remove_all(handles: list[RemovableHandle], classes: list[type[nn.Module]]) -> None:
    """Take the hooks off, and let the classes on which none is left be copied by themselves."""
    for handle in handles:
        handle.remove()
    handles.clear()
    for kind in classes:
        _HOOKED_CLASSES[kind] -= 1
        if not _HOOKED_CLASSES[kind]:
            del _HOOKED_CLASSES[kind]
            if copyreg.dispatch_table.get(kind) is _reduced:
                del copyreg.dispatch_table[kind]
    classes.clear()


def owners_of_hooks(module: nn.Module) -> list[object]:
    return [hook.owner for hook in _forward_hooks(module) if isinstance(hook, Hook)]


def is_hooked(module: nn.Module) -> bool:
    """Tell whether a hook of this package is on the module."""
    return any(isinstance(hook, Hook) for hook in _forward_hooks(module))


def has_only_our_hooks(module: nn.Module) -> bool:
    return all(isinstance(hook, Hook) for hook in _forward_hooks(module))


def _forward_hooks(module: nn.Module) -> list[Any]:
    return [hook for table in _SIDE_TABLES for hook in vars(module)[table].values()]
