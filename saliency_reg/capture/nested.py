"""Tensors in nested arguments and return values: found, read, and replaced in a copy."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..errors import CaptureError

#: A part of a return value: an index, a key, an attribute, or a function of the value.
Item = Union[int, str, Callable[[Any], Any]]
#: The way to a tensor in nested values, from the outside in.
Path = tuple[Union[int, str], ...]


def pick(value: Any, items: Sequence[Item]) -> Any:
    """Follow the items into a value; ``None`` where one of them leads nowhere. A tensor is never taken apart."""
    for item in items:
        if callable(item):
            value = item(value)
        elif isinstance(value, Tensor):
            return None
        else:
            try:
                value = _child(value, item)
            except (AttributeError, IndexError, KeyError, TypeError):
                return None
    return value


def put(value: Any, items: Sequence[int | str], new: Tensor) -> Any:
    """Return a copy of ``value`` with ``new`` where the items lead; what is beside the way is not copied."""
    if not items:
        return new
    item, rest = items[0], items[1:]
    replaced = put(_child(value, item), rest, new)
    if isinstance(value, tuple) and isinstance(item, str):
        return value._replace(**{item: replaced})  # type: ignore[attr-defined]  # a named tuple
    if isinstance(value, (tuple, list)):
        parts = [*value]
        parts[int(item)] = replaced
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    twin = copy.copy(value)
    if isinstance(value, Mapping):
        twin[_key(value, item)] = replaced
    else:
        object.__setattr__(twin, str(item), replaced)
    return twin


def put_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], path: Path, new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with ``new`` where the path leads; its first step is a position or a name."""
    if isinstance(path[0], int):
        return put(args, path, new), kwargs
    return args, put(kwargs, path, new)


def contents(value: Any) -> str:
    """Say what can be picked from a value, for an error."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor"
    kind = f"a {type(value).__name__}"
    if isinstance(value, Mapping):
        return f"{kind} with the keys {list(value)}"
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Path, Tensor | None]:
    """Return the first floating-point tensor among the arguments, not inside of lists, and the way to it."""
    for name, value in _named(args, kwargs):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (name,), value
    return (), None


def unfolded(value: Any) -> Any:
    """Return what :func:`tensors_in` looks into: of an object that is no list or mapping, its attributes."""
    return value if isinstance(value, (Tensor, Mapping, list, tuple)) else getattr(value, "__dict__", {})


def part_of_each(outputs: Mapping[str, Any]) -> str:
    """Say what ``output=`` may be for tasks of which some have no tensor: the first index, key or attribute that is one."""
    parts = {
        task: next((path[1] for path, _ in tensors_in((unfolded(value),), {}) if len(path) == 2), "logits")
        for task, value in outputs.items()
        if not isinstance(value, Tensor)
    }
    one_for_all = len(parts) == len(outputs) and len(set(parts.values())) == 1
    return f"output={(next(iter(parts.values())) if one_for_all else parts)!r}"


def why_unusable(value: Any) -> str:
    """Say what a tensor has to be made into before it can be a feature map; nothing for one that can."""
    if not isinstance(value, Tensor):
        return ""
    if value.is_complex():
        return (
            "is complex, and the saliency is of real numbers. Pass torch.view_as_real(feature) on, and complex inside"
        )
    if value.is_nested or value.layout != torch.strided:
        kind = "nested (jagged)" if value.is_nested else str(value.layout)
        return f"is {kind}, expected a dense tensor. Pad the batch (feature.to_padded_tensor(0.0)), and pass mask="
    return ""


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Path, Tensor]]:
    """Yield all floating-point tensors among the arguments, inside of lists, tuples and mappings too, with their paths."""
    waiting: list[tuple[Path, Any]] = [((name,), value) for name, value in _named(args, kwargs)]
    for path, value in waiting:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield path, value
        elif isinstance(value, Mapping):
            waiting += [((*path, key), part) for key, part in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [((*path, index), part) for index, part in enumerate(value)]


def taken_by(
    name: str, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of another head as this one takes them, which may call the feature map by another name."""
    if not kwargs:
        return args, kwargs
    parameters = inspect.signature(head.forward).parameters.values()
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if open_ended or kwargs.keys() <= {parameter.name for parameter in parameters}:
        return args, kwargs
    if not args and len(kwargs) == 1:
        return tuple(kwargs.values()), {}
    raise CaptureError(
        f"head {name!r} did not run in this forward, and cannot be run as another one was, with {list(kwargs)} by name: its "
        f"forward takes {[parameter.name for parameter in parameters]}. Use the same names in all heads, or call them with "
        "positions only."
    )


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[int | str, Any]]:
    return [*enumerate(args), *kwargs.items()]


def _child(value: Any, item: int | str) -> Any:
    if isinstance(value, Mapping):
        return value[_key(value, item)]
    return getattr(value, item) if isinstance(item, str) else value[item]


def _key(value: Mapping[Any, Any], item: int | str) -> int | str:
    """Return the key that is meant: that of digits may be a number, or a string."""
    if item not in value:
        if isinstance(item, int):
            return str(item)
        if item.lstrip("-").isdigit() and int(item) in value:
            return int(item)
    return item
