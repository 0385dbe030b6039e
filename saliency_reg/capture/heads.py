"""Finding the modules of a model that are its task heads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Union

from torch import nn

from ..errors import (
    AmbiguousHeadsError,
    ConfigurationError,
    HeadNotFoundError,
    MissingArgumentError,
    TaskError,
    WrongTypeError,
)
from ..tasks import check_task_names
from .lookup import find_module, match_names, name_of

_OneHead = Union[str, nn.Module]
#: What the public ``heads=`` accepts.
HeadsChoice = Union[_OneHead, Sequence[_OneHead], Mapping[str, _OneHead], None]

# Names of a container of heads, and of heads that are siblings (decoder_embed and decoder_norm are parts of one decoder).
_CONTAINER_WORD = re.compile(r"(?i)(?:^|_)(head|classifier|decoder|tower|predictor|readout|task)s?\d*(?:_|$)")
_SIBLING_WORD = re.compile(r"(?i)(?:^|_)(head|classifier|tower|predictor|readout|task)s?\d*(?:_|$)")

_COMPILED = (
    "{} is compiled by torch.compile, which has no second derivative and hides what hooks see. Compile the backbone alone: "
    "model.backbone.compile()."
)


@dataclass(frozen=True)
class Heads:
    """The heads of a model, in the order of the tasks."""

    tasks: tuple[str, ...]  # T names, unique
    names: tuple[str, ...]  # of the modules in the model
    modules: tuple[nn.Module, ...]  # T, or a single one whose output has one column per task (``columns``)
    columns: bool


def resolve_heads(model: nn.Module, heads: HeadsChoice, tasks: Sequence[str] | None) -> Heads:
    """Turn the user's choice into modules; without a choice, find the heads if they are unambiguous."""
    task_names = None if tasks is None else check_task_names(tasks)
    if heads is None:
        heads = _find_heads(model, task_names)
    if isinstance(heads, Mapping):
        given = [str(task) for task in heads]
        if task_names not in (None, given):
            raise TaskError(f"heads= names the tasks {given}, tasks= names {task_names}. Leave tasks= out.")
        task_names = given
        found = [find_module(model, head, "head") for head in heads.values()]
    elif isinstance(heads, (str, nn.Module)):
        found = _expand(model, heads)
    elif isinstance(heads, Sequence):
        found = [one for head in heads for one in _expand(model, head, containers=len(heads) == 1)]
    else:
        raise WrongTypeError(
            f"heads must be a name, a module, a list of them, or a mapping {{task: name or module}}; found "
            f"{type(heads).__name__}."
        )
    names, modules = [name for name, _ in found], [module for _, module in found]
    check_not_compiled(model, names, modules)
    _check_disjoint(model, names, modules)
    if len(modules) == 1 and not isinstance(heads, Mapping):
        return _columns_head(names[0], modules[0], task_names)
    if len(modules) < 2:
        raise TaskError(
            f"found {len(modules)} head(s) {names}; relations between tasks need at least 2. For one module whose output "
            "has a column per task, pass heads='name', tasks=[...]."
        )
    if task_names is None:
        task_names = _short_names(names)
    if len(task_names) != len(modules):
        raise TaskError(
            f"found {len(task_names)} task names {task_names} for {len(modules)} heads {names}. Name each head once."
        )
    return Heads(tuple(check_task_names(task_names)), tuple(names), tuple(modules), columns=False)


def check_not_compiled(model: nn.Module, names: Sequence[str], heads: Sequence[nn.Module]) -> None:
    """Refuse heads of which a part is compiled, and compiled modules around them."""
    ids = {id(head) for head in heads}
    for name, module in model.named_modules():
        if _is_compiled(module) and any(id(part) in ids for part in module.modules()):
            raise ConfigurationError(_COMPILED.format(name or "the model"))
    for name, head in zip(names, heads):
        for inner, module in head.named_modules():
            if _is_compiled(module):
                raise ConfigurationError(_COMPILED.format(f"{name}.{inner}" if inner else name))


def _is_compiled(module: nn.Module) -> bool:
    # By torch.compile(module) or module.compile(). Not hasattr: a wrapper may pass unknown names on to a part of it.
    return "_orig_mod" in vars(module).get("_modules", {}) or vars(module).get("_compiled_call_impl") is not None


def _columns_head(name: str, module: nn.Module, tasks: list[str] | None) -> Heads:
    widths = [
        layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for layer in module.modules()
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
    ]
    width = widths[-1] if widths else None
    if tasks is None:
        if width is None:
            raise MissingArgumentError(
                f"{name!r} is one module for all tasks, and its number of columns is not known before it ran. Pass "
                "tasks=[...] with one name per column."
            )
        if width < 2:
            raise TaskError(
                f"{name!r} is a single head with {width} output; relations between tasks need at least 2. Name all heads."
            )
        tasks = [str(column) for column in range(width)]
    elif width is not None and width != len(tasks):
        raise TaskError(
            f"tasks= has {len(tasks)} names, but {name!r} has {width} output columns. Name each column once."
        )
    return Heads(tuple(tasks), (name,), (module,), columns=True)


def _expand(model: nn.Module, head: _OneHead, containers: bool = True) -> list[tuple[str, nn.Module]]:
    """Return the modules that one entry of ``heads=`` means; a container stands for its children."""
    if isinstance(head, str) and any(character in head for character in "*?["):
        return [(name, model.get_submodule(name)) for name in match_names(model, head, "head")]
    name, module = find_module(model, head, "head")
    if containers and isinstance(module, (nn.ModuleDict, nn.ModuleList)):
        prefix = name + "." if name_of(model, module) == name else ""
        return [(prefix + child_name, child) for child_name, child in module.named_children()]
    return [(name, module)]


def _find_heads(model: nn.Module, tasks: list[str] | None) -> HeadsChoice:
    groups = _candidate_groups(model)
    if len(groups) > 1 and tasks is not None:
        groups = {label: names for label, names in groups.items() if len(names) == len(tasks)} or groups
    if len(groups) == 1:
        return next(iter(groups.values()))
    if groups:
        listed = "; ".join(f"{label!r} ({len(names)} modules)" for label, names in groups.items())
        raise AmbiguousHeadsError(
            f"{type(model).__name__} has several groups of modules that could be the heads: {listed}. Pass heads= with "
            "one of these names, a pattern, or a list of modules."
        )
    if tasks is not None:
        fitting = [
            str(name)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == len(tasks)
        ]
        if len(fitting) == 1:
            return fitting[0]
    children = ", ".join(repr(name) for name, _ in model.named_children()) or "none"
    raise HeadNotFoundError(
        f"no heads were found in {type(model).__name__} (its children: {children}). Pass heads= with their names, e.g. "
        "heads=['smiling', 'young'], or heads='fc', tasks=[...] for one layer with a column per task."
    )


def _candidate_groups(model: nn.Module) -> dict[str, list[str]]:
    """Find groups of modules that are named like heads: a container, or siblings such as head_a and head_b."""
    groups: dict[str, list[str]] = {}
    dictionaries: dict[str, list[str]] = {}
    siblings: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(container + ".") for container in groups):
            continue
        parent, _, last = name.rpartition(".")
        if isinstance(module, (nn.ModuleDict, nn.ModuleList)) and len(module) >= 2:
            children = [f"{name}.{child}" for child, _ in module.named_children()]
            if _CONTAINER_WORD.search(last):
                groups[name] = children
            elif isinstance(module, nn.ModuleDict):
                dictionaries[name] = children
        elif word := _SIBLING_WORD.search(last):
            siblings.setdefault((parent, word.group(1).lower()), []).append(name)
    for (parent, word_found), names in siblings.items():
        if len(names) >= 2:
            groups[f"{parent}.*{word_found}*" if parent else f"*{word_found}*"] = names
    return groups or dictionaries


def _check_disjoint(model: nn.Module, names: Sequence[str], modules: Sequence[nn.Module]) -> None:
    for i, module in enumerate(modules):
        if module is model:
            raise TaskError(
                "the model itself was given as a head. Name the modules inside it that end in a task's output."
            )
        inside = {id(child) for child in module.modules()}
        for j, other in enumerate(modules):
            if i < j and other is module:
                raise TaskError(f"head {names[i]!r} was given twice. Each task needs a head of its own.")
            if i != j and id(other) in inside:
                raise TaskError(
                    f"head {names[j]!r} is part of head {names[i]!r}. Choose heads that do not contain each other."
                )


def _short_names(names: Sequence[str]) -> list[str]:
    """Drop the components that all names share at their beginning and end: heads.young.fc -> young."""
    parts = [name.split(".") for name in names]
    for end in (0, -1):
        while all(len(part) > 1 for part in parts) and len({part[end] for part in parts}) == 1:
            for part in parts:
                del part[end]
    short = [".".join(part) for part in parts]
    if len(set(short)) == len(short):
        return short
    return [f"{name}_{index}" for index, name in enumerate(short)]
