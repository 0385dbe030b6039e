"""Finding modules of a model by name, suffix, pattern or object, and feature maps by the address of a module's port."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import (
    AmbiguousModuleError,
    ConfigurationError,
    HeadNotFoundError,
    ModuleNotFoundInModelError,
    WrongTypeError,
)


def match_names(model: nn.Module, wanted: str) -> list[str]:
    """Names of the modules that ``wanted`` means: exact name, else dotted suffix, else pattern.

    In a pattern ``*``, ``?`` and ``[...]`` stay inside one component, so ``"heads.*"`` means the direct children.
    """
    names = [name for name, _ in model.named_modules() if name]
    if wanted in names:
        return [wanted]
    if suffixed := [name for name in names if name.endswith("." + wanted)]:
        return suffixed
    pattern = wanted.split(".")
    return [
        name
        for name in names
        if len(parts := name.split(".")) == len(pattern)
        and all(fnmatch.fnmatchcase(part, piece) for part, piece in zip(parts, pattern))
    ]


def is_pattern(wanted: str) -> bool:
    """Whether a name is meant as a pattern."""
    return any(character in wanted for character in "*?[")


def find_module(model: nn.Module, wanted: str | nn.Module, what: str) -> tuple[str, nn.Module]:
    """The one module that ``wanted`` names or is; ``what`` says in errors what it was for."""
    if isinstance(wanted, nn.Module):
        return name_of(model, wanted), wanted
    if not isinstance(wanted, str):
        raise WrongTypeError(f"a {what} is given by its name or as a module, found {type(wanted).__name__}.")
    names = match_names(model, wanted)
    if len(names) > 1:
        raise AmbiguousModuleError(
            f"{what} {wanted!r} means several modules: {_listed(names)}. Pass the full name of one"
            + (", or a pattern such as " + repr("*." + wanted) + " for all of them." if what == "head" else ".")
        )
    if not names:
        raise not_found(model, wanted, what)
    return names[0], model.get_submodule(names[0])


def not_found(model: nn.Module, wanted: str, what: str) -> ModuleNotFoundInModelError:
    """The error for a name that matches nothing, with near misses."""
    names = [name for name, _ in model.named_modules() if name]
    by_last: dict[str, str] = {name.rpartition(".")[2]: name for name in names}
    near = difflib.get_close_matches(wanted, [*names, *by_last], n=3, cutoff=0.5)
    hint = (
        f"Did you mean {_listed(dict.fromkeys(by_last.get(str(name), str(name)) for name in near))}?"
        if near
        else (f"It has {_listed(name for name, _ in model.named_children()) or 'no sub-modules'}.")
    )
    error = HeadNotFoundError if what == "head" else ModuleNotFoundInModelError
    return error(
        f"{type(model).__name__} has no {what} {wanted!r}. {hint} Names are those of model.named_modules(); a suffix or "
        "a pattern such as 'heads.*' works too."
    )


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The module's name in the model, or its class name where it is not part of it."""
    for name, candidate in model.named_modules():
        if candidate is module:
            return str(name)
    return type(module).__name__


@dataclass(frozen=True)
class FeatureAddress:
    """A feature map as the user names it: ``"encoder"``, ``"encoder:output.last_hidden_state"``, ``"pool:input"``."""

    module: str | nn.Module
    port: str
    items: tuple[int | str, ...]

    @property
    def suffix(self) -> str:
        """The part behind the module's name."""
        return ":" + ".".join([self.port, *map(str, self.items)])


def parse_feature(feature: str | nn.Module) -> FeatureAddress:
    """Split ``"name:port.item.item"``; without a colon, the output is meant.

    Raises:
        ConfigurationError: another port than ``input`` or ``output``.
        WrongTypeError: neither a name nor a module.
    """
    if isinstance(feature, nn.Module):
        return FeatureAddress(feature, "output", ())
    if not isinstance(feature, str):
        raise WrongTypeError(
            f"a feature is given by its name or as a module (or a list of them), found {type(feature).__name__}."
        )
    name, colon, rest = feature.partition(":")
    port, *items = rest.split(".") if colon else ["output"]
    if port not in ("input", "output"):
        raise ConfigurationError(
            f"feature= ends in ':{rest}'. Pass '{name}:output' (the default) or '{name}:input', and for a part of it "
            f"'{name}:output.{rest}'."
        )
    return FeatureAddress(name, port, tuple(int(item) if item.lstrip("-").isdigit() else item for item in items))


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
