"""Which modules of a model are its task heads."""

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
from ..torch_tools import has_only_our_hooks
from .lookup import find_module, is_pattern, match_names, name_of, not_found

_OneHead = Union[str, nn.Module]
#: What the public ``heads=`` accepts.
HeadsChoice = Union[_OneHead, Sequence[_OneHead], Mapping[str, _OneHead], None]

# Names of a container of heads, and of heads that are siblings (decoder_embed and decoder_norm are parts of one decoder).
_CONTAINER_WORD = re.compile(
    r"(?:^|_)(head|classifier|decoder|tower|predictor|readout|task)s?\d*(?:_|$)", re.IGNORECASE
)
_SIBLING_WORD = re.compile(r"(?:^|_)(head|classifier|tower|predictor|readout|task)s?\d*(?:_|$)", re.IGNORECASE)


_COMPILED = (
    "{} is compiled by torch.compile, which has no second derivative and hides what hooks see. Compile the backbone alone: "
    "model.backbone.compile()."
)


@dataclass(frozen=True)
class Heads:
    """The heads of a model, in the order of the tasks.

    Attributes:
        tasks: T names, unique.
        names: the heads' names in the model.
        modules: T modules, or a single one whose output has one column per task (``columns``).
        columns: whether a single module serves all tasks.
    """

    tasks: tuple[str, ...]
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    columns: bool


def resolve_heads(model: nn.Module, heads: HeadsChoice, tasks: Sequence[str] | None) -> Heads:
    """Turn the user's choice into modules; without a choice, find the heads if they are unambiguous.

    Raises:
        HeadNotFoundError, AmbiguousHeadsError, TaskError, MissingArgumentError, WrongTypeError: a bad choice.
        ConfigurationError: a head is compiled, or a part of one, or the model as a whole.
    """
    task_names = None if tasks is None else check_task_names(tasks)
    if heads is None:
        heads = _find_heads(model, task_names)
    given: list[str] | None = None
    if isinstance(heads, Mapping):
        if task_names is not None and task_names != [str(task) for task in heads]:
            raise TaskError(
                f"heads= names the tasks {[str(task) for task in heads]}, tasks= names {task_names}. Leave tasks= out."
            )
        given = [str(task) for task in heads]
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
    if len(modules) == 1 and given is None:
        return _columns_head(names[0], modules[0], task_names)
    if len(modules) < 2:
        raise TaskError(
            f"found {len(modules)} head(s) {names}; relations between tasks need at least 2. For one module whose output "
            "has a column per task, pass heads='name', tasks=[...]."
        )
    if given is None:
        given = task_names if task_names is not None else _short_names(names)
    if len(given) != len(modules):
        raise TaskError(f"found {len(given)} task names {given} for {len(modules)} heads {names}. Name each head once.")
    return Heads(tuple(check_task_names(given)), tuple(names), tuple(modules), columns=False)


def check_not_compiled(model: nn.Module, names: Sequence[str], heads: Sequence[nn.Module]) -> None:
    """Compiled code has no second derivative, and a model compiled as a whole hides what its hooks would see.

    Raises:
        ConfigurationError: the model or a part of a head is compiled.
    """
    inside = [
        (f"{name}.{inner}" if inner else name, module)
        for name, head in zip(names, heads)
        for inner, module in head.named_modules()
    ]
    heads_inside = {id(head) for head in heads}
    around = [
        (name or "the model", module)
        for name, module in model.named_modules()
        if _is_compiled(module) and any(id(part) in heads_inside for part in module.modules())
    ]
    for name, module in [*around, *inside]:
        if _is_compiled(module):
            raise ConfigurationError(_COMPILED.format(name))


def _is_compiled(module: nn.Module) -> bool:
    """Whether the module itself is compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    # Not hasattr: a wrapper may pass unknown names on to a part of it.
    return "_orig_mod" in vars(module).get("_modules", {}) or vars(module).get("_compiled_call_impl") is not None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether the output is nothing but ``x @ weight.T + bias``: no subclass, no parametrisation, no foreign hook."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and has_only_our_hooks(module)


def output_width(head: nn.Module) -> int | None:
    """Number of output columns, where the last ``Linear`` or convolution tells."""
    layers = [module for module in head.modules() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))]
    if not layers:
        return None
    last = layers[-1]
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels


def _columns_head(name: str, module: nn.Module, tasks: list[str] | None) -> Heads:
    width = output_width(module)
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
    """The modules that one entry of ``heads=`` means; a container stands for its children."""
    if isinstance(head, str) and is_pattern(head):
        if not (names := match_names(model, head)):
            raise not_found(model, head, "head")
        return [(name, model.get_submodule(name)) for name in names]
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
        listed = "; ".join(f"{label} ({len(names)} modules)" for label, names in groups.items())
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
    """Groups of modules that are named like heads: a container, or siblings such as head_a and head_b."""
    groups: dict[str, list[str]] = {}
    dictionaries: dict[str, list[str]] = {}
    siblings: dict[tuple[str, str], list[str]] = {}
    taken: list[str] = []
    for name, module in model.named_modules():
        if not name or any(name.startswith(prefix + ".") for prefix in taken):
            continue
        parent, _, last = name.rpartition(".")
        if isinstance(module, (nn.ModuleDict, nn.ModuleList)) and len(module) >= 2:
            children = [f"{name}.{child}" for child, _ in module.named_children()]
            if _CONTAINER_WORD.search(last):
                groups[repr(name)] = children
                taken.append(name)
            elif isinstance(module, nn.ModuleDict):
                dictionaries[repr(name)] = children
        elif word := _SIBLING_WORD.search(last):
            siblings.setdefault((parent, word.group(1).lower()), []).append(name)
    for (parent, word_found), names in siblings.items():
        if len(names) >= 2:
            groups[repr(f"{parent}.*{word_found}*" if parent else f"*{word_found}*")] = names
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
    while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    while all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    short = [".".join(part) for part in parts]
    if len(set(short)) == len(short):
        return short
    return [f"{name}_{index}" for index, name in enumerate(short)]
