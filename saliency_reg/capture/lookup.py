"""Finding modules of a model by name, suffix, pattern or object, and feature maps by the address of a module's port."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Union

from torch import nn

from ..errors import (
    AmbiguousModuleError,
    ConfigurationError,
    HeadNotFoundError,
    ModuleNotFoundInModelError,
    WrongTypeError,
)


def match_names(model: nn.Module, wanted: str, what: str) -> list[str]:
    """Return the names of the modules that ``wanted`` means: exact name, else dotted suffix, else pattern.

    In a pattern ``*``, ``?`` and ``[...]`` stay inside one component, so ``"heads.*"`` means the direct children. ``what``
    says in errors what the modules are for.
    """
    names = [name for name, _ in model.named_modules() if name]
    found = [wanted] if wanted in names else [name for name in names if name.endswith("." + wanted)]
    if not found:
        pattern = wanted.split(".")
        found = [
            name
            for name in names
            if len(parts := name.split(".")) == len(pattern) and all(map(fnmatch.fnmatchcase, parts, pattern))
        ]
    if found:
        return found
    by_last = {name.rpartition(".")[2]: name for name in names}
    near = difflib.get_close_matches(wanted, [*names, *by_last], n=3, cutoff=0.5)
    if near:
        full = dict.fromkeys(name if name in names else by_last[name] for name in near)
        hint = f"Did you mean {listed(map(repr, full))}?"
    else:
        children = [repr(name) for name, _ in model.named_children()]
        # Heads are among the last ones.
        hint = f"It has {listed(children[::-1] if what == 'head' else children) or 'no sub-modules'}."
    error = HeadNotFoundError if what == "head" else ModuleNotFoundInModelError
    raise error(
        f"{type(model).__name__} has no {what} {wanted!r}. {hint} Names are those of model.named_modules(); a suffix or "
        "a pattern such as 'heads.*' works too."
    )


def find_module(model: nn.Module, wanted: str | nn.Module, what: str) -> tuple[str, nn.Module]:
    """Return the one module that ``wanted`` names or is."""
    if isinstance(wanted, nn.Module):
        return name_of(model, wanted), wanted
    if not isinstance(wanted, str):
        raise WrongTypeError(f"a {what} is given by its name or as a module, found {type(wanted).__name__}.")
    names = match_names(model, wanted, what)
    if len(names) > 1:
        raise AmbiguousModuleError(
            f"{what} {wanted!r} means several modules: {listed(map(repr, names))}. Pass the full name of one"
            + (", or a pattern such as " + repr("*." + wanted) + " for all of them." if what == "head" else ".")
        )
    return names[0], model.get_submodule(names[0])


def name_of(model: nn.Module, module: nn.Module) -> str:
    return next((name for name, inner in model.named_modules() if inner is module), type(module).__name__)


#: What the public ``feature=`` accepts.
FeatureChoice = Union[str, nn.Module, Sequence[Union[str, nn.Module]], None]


@dataclass(frozen=True)
class NamedFeature:
    """A feature map that the user has named: ``"encoder"``, ``"encoder:output.last_hidden_state"``, ``"pool:input"``."""

    name: str  # in full
    module: nn.Module
    port: str  # "input" or "output"
    items: tuple[int | str, ...]


def locate_features(model: nn.Module, feature: FeatureChoice) -> list[NamedFeature]:
    """Find the feature maps that the user has named, each once."""
    chosen: list[Any]
    if feature is None:
        chosen = []
    elif isinstance(feature, (str, nn.Module)) or not isinstance(feature, Iterable):
        chosen = [feature]
    else:
        chosen = list(feature)
    features = [locate_feature(model, one) for one in chosen]
    names = [named.name for named in features]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"feature= names a feature map twice: {names}. Name each once.")
    return features


def locate_feature(model: nn.Module, feature: str | nn.Module) -> NamedFeature:
    """Find the module of ``"name:port.item.item"``; without a colon, its output is meant."""
    port, items = "output", []
    if isinstance(feature, str):
        feature, colon, rest = feature.partition(":")
        if colon:
            port, *items = rest.split(".")
        if port not in ("input", "output"):
            named, _, part = rest.rpartition(":")
            raise ConfigurationError(
                f"feature= ends in ':{rest}'. Pass '{feature}:output' (the default) or '{feature}:input', and for a part "
                f"of it '{feature}:{named or 'output'}.{part}'."
            )
    elif not isinstance(feature, nn.Module):
        raise WrongTypeError(
            f"a feature is given by its name or as a module (or a list of them), found {type(feature).__name__}."
        )
    name, module = find_module(model, feature, "feature")
    path = tuple(int(item) if item.lstrip("-").isdigit() else item for item in items)
    return NamedFeature(f"{name}:{'.'.join([port, *map(str, path)])}", module, port, path)


def listed(parts: Iterable[str], most: int = 8) -> str:
    """Join the first ones, and say how many more there are."""
    parts = list(parts)
    return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "")
