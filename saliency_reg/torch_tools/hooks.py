"""Lasting hooks on other people's modules: the one place that sets them and takes them off; optimizer hooks build on it.

A hook does not keep its owner alive (unless it is told to), is removed when the owner is garbage collected, and does not
travel: a deep copy or a pickle of a hooked module is a clean module.
"""

from __future__ import annotations

import copyreg
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..errors import ScriptingError
from .checks import warn_user
from .readers import reader

#: nn.Module keeps the ids of hooks with special calling conventions in tables beside these two.
_SIDE_TABLES = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}

_COMPILED = "_compiled_call_impl"
#: What a call of a module goes through beside its forward.
_CALLED = (*_SIDE_TABLES, "_backward_pre_hooks", "_backward_hooks", _COMPILED)


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


#: Owners of hooks that were found on modules which took the place of theirs.
_told: weakref.WeakSet[Any] = weakref.WeakSet()


class _ModuleHook(Hook):
    """Calls a method before or after a forward of one module; it steps aside where that is read by others.

    Whoever swaps modules may take hooks along, to where nobody knows of them and without their keyword arguments: there
    the hook takes itself off, and says so.
    """

    def __init__(
        self, module: nn.Module, method: Callable[..., Any], bound: tuple[Any, ...], keep: bool, tells: bool
    ) -> None:
        super().__init__(method, *bound, keep=keep)
        self._module = weakref.ref(module)
        self._tells = tells

    @property
    def __name__(self) -> str:
        raise ScriptingError(
            "TorchScript cannot compile the hooks of an attached regularizer or surgery. Call .remove() on it before "
            "torch.jit.script, or use torch.jit.trace or torch.export, for which they step aside."
        )

    def is_on(self, module: nn.Module) -> bool:
        return self._module() is module

    def __call__(self, *args: Any) -> Any:
        if self._module() is not args[0]:
            return self._leave(args[0])
        return None if reader() is not None else super().__call__(*args)

    def _leave(self, module: nn.Module) -> None:
        if getattr(module, "_is_replica", False):  # of DataParallel: its tables are those of the module
            return
        for table in _SIDE_TABLES:
            for key in [key for key, hook in vars(module)[table].items() if hook is self]:
                del vars(module)[table][key]
        owner = self.owner
        if self._tells and owner is not None and owner not in _told:
            _told.add(owner)
            warn_user(
                f"a {type(module).__name__} has taken the place of a module that a regularizer or surgery is attached to, "
                "as quantization and fusing of modules do; it is not seen there. Call .remove() before modules are swapped, "
                "and attach a new one afterwards to go on training with it."
            )


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

    With ``keep`` the modules keep the owner alive, for an owner that nobody has to call. ``tells`` is whether the user is
    told of hooks that others took along to another module.
    """

    def __init__(self, owner: object, keep: bool = False, *, tells: bool = True) -> None:
        self._keep = keep
        self._tells = tells
        self._handles: list[RemovableHandle] = []
        self._classes: list[type[nn.Module]] = []
        # The finalizer must not refer to the owner, so it is given the lists and a function outside of it.
        weakref.finalize(owner, remove_all, self._handles, self._classes).atexit = False

    def before(self, module: nn.Module, method: Callable[..., Any], *bound: Any, first: bool = False) -> None:
        """Call ``method(*bound, module, args, kwargs)`` before each forward; with ``first``, before the hooks of others."""
        hook = self._hook(module, method, bound)
        self._handles.append(module.register_forward_pre_hook(hook, prepend=first, with_kwargs=True))

    def after(self, module: nn.Module, method: Callable[..., Any], *bound: Any, always: bool = False) -> None:
        """Call ``method(*bound, module, args, output)`` after each forward; with ``always``, also when it raised."""
        hook = self._hook(module, method, bound)
        self._handles.append(module.register_forward_hook(hook, always_call=always))

    def remove(self) -> None:
        remove_all(self._handles, self._classes)

    def _hook(self, module: nn.Module, method: Callable[..., Any], bound: tuple[Any, ...]) -> _ModuleHook:
        kind = type(module)
        self._classes.append(kind)
        _HOOKED_CLASSES[kind] += 1
        copyreg.dispatch_table.setdefault(kind, _reduced)
        return _ModuleHook(module, method, bound, self._keep, self._tells)


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


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Within, the module and those in it run without any hook, and as they were before ``module.compile()``."""
    before = [(each, {name: vars(each)[name] for name in _CALLED if name in vars(each)}) for each in module.modules()]
    try:
        for each, found in before:
            vars(each).update({name: None if name == _COMPILED else OrderedDict() for name in found})
        yield
    finally:
        for each, found in before:
            vars(each).update(found)


def owners_of_hooks(module: nn.Module) -> list[object]:
    return [hook.owner for hook in _forward_hooks(module) if isinstance(hook, Hook)]


def is_hooked(module: nn.Module, besides: Sequence[object] = ()) -> bool:
    """Tell whether a hook of this package is on the module, ``besides`` those of some owners."""
    hooks = [hook for hook in _forward_hooks(module) if isinstance(hook, _ModuleHook) and hook.is_on(module)]
    return any(all(hook.owner is not owner for owner in besides) for hook in hooks)


def has_only_our_hooks(module: nn.Module) -> bool:
    return all(isinstance(hook, Hook) for hook in _forward_hooks(module))


def _forward_hooks(module: nn.Module) -> list[Any]:
    return [hook for table in _SIDE_TABLES for hook in vars(module)[table].values()]
