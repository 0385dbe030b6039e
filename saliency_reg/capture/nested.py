"""Where a tensor sits among the arguments or in the return value of a module."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

from torch import Tensor, nn

from ..errors import ConfigurationError, WrongTypeError

__all__ = ["FeaturePlace", "Item", "contents", "first_tensor", "parse_feature", "pick", "put", "put_argument"]

#: A part of a return value: an index, a key, an attribute, or a function of the value.
Item = Union[int, str, Callable[[Any], Any]]


@dataclasses.dataclass(frozen=True)
class FeaturePlace:
    """A feature map as the user names it: ``"encoder"``, ``"encoder:output.last_hidden_state"``, ``"pool:input"``."""

    module: str | nn.Module
    port: str
    items: tuple[int | str, ...]

    @property
    def suffix(self) -> str:
        """The part behind the module's name."""
        return ":" + ".".join([self.port, *map(str, self.items)])


def parse_feature(feature: str | nn.Module) -> FeaturePlace:
    """Split ``"name:port.item.item"``; without a colon, the output is meant.

    Raises:
        ConfigurationError: another port than ``input`` or ``output``.
        WrongTypeError: neither a name nor a module.
    """
    if isinstance(feature, nn.Module):
        return FeaturePlace(feature, "output", ())
    if not isinstance(feature, str):
        raise WrongTypeError(
            f"a feature is given by its name or as a module (or a list of them), found {type(feature).__name__}."
        )
    name, colon, place = feature.partition(":")
    port, *items = place.split(".") if colon else ["output"]
    if port not in ("input", "output"):
        raise ConfigurationError(
            f"feature= ends in ':{place}'. Type '{name}:output' (the default) or '{name}:input', and for a part of it "
            f"'{name}:output.{place}'."
        )
    return FeaturePlace(name, port, tuple(int(item) if item.lstrip("-").isdigit() else item for item in items))


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
    """A copy of ``value`` with ``new`` where the items lead; what is beside the way is not copied."""
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
        twin[item] = replaced
    else:
        object.__setattr__(twin, str(item), replaced)
    return twin


def contents(value: Any) -> str:
    """What can be picked from a value, for an error."""
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _child(value: Any, item: int | str) -> Any:
    return getattr(value, item) if isinstance(item, str) and not isinstance(value, Mapping) else value[item]


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | str | None:
    """Position or name of the first floating-point tensor among the arguments."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point():
            return place
    return None


def put_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], items: Sequence[int | str], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with ``new`` where the items lead; the first one is a position or a name."""
    if isinstance(items[0], int):
        return put(args, items, new), kwargs
    return args, put(kwargs, items, new)
