"""Where a tensor sits among the arguments or in the return value of a module."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import ConfigurationError, WrongTypeError

__all__ = ["FeaturePlace", "Item", "first_tensor", "parse_feature", "pick", "swap"]

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
        raise ConfigurationError(f"feature= ends in ':{place}'. Type '{name}:output' (the default) or '{name}:input'.")
    return FeaturePlace(name, port, tuple(int(item) if item.isdigit() else item for item in items))


def pick(value: Any, items: Sequence[Item]) -> Any:
    """Follow the items into a value; ``None`` where one of them leads nowhere."""
    for item in items:
        try:
            if callable(item):
                value = item(value)
            elif isinstance(item, str) and not isinstance(value, Mapping):
                value = getattr(value, item)
            else:
                value = value[item]
        except (AttributeError, IndexError, KeyError, TypeError):
            return None
    return value


def swap(container: Any, old: Tensor, new: Tensor) -> Any:
    """The same structure with ``new`` in the place of ``old``; the original is left alone."""
    if container is old:
        return new
    if type(container) is tuple:
        return tuple(swap(part, old, new) for part in container)
    if type(container) is dict:
        return {key: swap(part, old, new) for key, part in container.items()}
    if dataclasses.is_dataclass(container) and not isinstance(container, (Mapping, type)):
        changed = {name: new for name, value in vars(container).items() if value is old}
        return dataclasses.replace(container, **changed)
    if isinstance(container, (Tensor, str, int, float, bool, type(None))):
        return container
    return pytree.tree_map(lambda leaf: new if leaf is old else leaf, container)


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating-point tensor among the arguments."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return None
