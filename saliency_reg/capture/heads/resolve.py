"""Finding the modules of a model that are its task heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Union

from torch import nn

from ...errors import ConfigurationError, HeadNotFoundError, MissingArgumentError, TaskError, WrongTypeError
from ...tasks import check_task_names, first_few, per_task
from ..lookup import find_module, match_names, name_of
from ..nested import Item
from .branches import Branch, continuations, last_part
from .column_groups import ColumnGroups, ColumnsChoice
from .head_search import find_heads, is_container, last_layer, widths

_OneModule = Union[str, nn.Module]
#: One head; a list is one of several modules, from where it begins to its output.
_OneHead = Union[_OneModule, Sequence[_OneModule]]
#: What the public ``heads=`` accepts.
HeadsChoice = Union[_OneModule, Sequence[_OneHead], Mapping[str, _OneHead], None]


@dataclass(frozen=True)
class Heads:
    """The heads of a model, in the order of the tasks."""

    tasks: tuple[str, ...]  # T names, unique
    names: tuple[str, ...]  # of the modules in the model
    modules: tuple[nn.Module, ...]  # T, or a single one with the outputs of all tasks (``columns``); some a Branch
    columns: bool
    groups: ColumnGroups | None = None  # which columns are those of each task, if not one each
    #: Modules that may go on where a head ends, with its number: whether they do is seen in each forward.
    goes_on: tuple[tuple[int, str, nn.Module], ...] = ()

    @property
    def ends(self) -> tuple[nn.Module, ...]:
        """The modules of the model whose outputs they are."""
        return tuple(map(last_part, self.modules))

    def describe(self) -> str:
        """Name them, for a person."""
        if not self.columns:
            return first_few(self.names)
        return f"{self.names[0]!r}, {'one column' if self.groups is None else 'columns'} for each of {len(self.tasks)} tasks"


def resolve_heads(
    model: nn.Module, heads: HeadsChoice, tasks: Sequence[str] | None, columns: ColumnsChoice = None
) -> Heads:
    """Turn the user's choice into modules; without a choice, find the heads if they are unambiguous."""
    task_names = None if tasks is None else check_task_names(tasks)
    groups = None if columns is None else ColumnGroups(columns)
    if groups is not None:
        if heads is None:
            raise MissingArgumentError("columns= are those of one head. Pass its name, too: heads='fc'.")
        if task_names not in (None, groups.tasks):
            raise TaskError(f"columns= names the tasks {groups.tasks}, tasks= names {task_names}. Leave tasks= out.")
        task_names = check_task_names(groups.tasks)
    if heads is None:
        heads = find_heads(model, task_names)
    if isinstance(heads, Mapping):
        given = [str(task) for task in heads]
        if groups is None and task_names not in (None, given):
            raise TaskError(f"heads= names the tasks {given}, tasks= names {task_names}. Leave tasks= out.")
        task_names = given if groups is None else task_names
        found = [one_head(model, head) for head in heads.values()]
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
    check_disjoint(model, names, modules)
    if groups is not None and len(modules) != 1:
        raise TaskError(
            f"columns= are those of one head, found {len(modules)} heads {names}. Pass one head, or leave it out."
        )
    if len(modules) == 1 and (groups is not None or not isinstance(heads, Mapping)):
        return columns_head(names[0], modules[0], task_names, groups)
    if len(modules) < 2:
        raise TaskError(
            f"found {len(modules)} head(s) {names}; relations between tasks need at least 2. For one module whose output "
            "has a column per task, pass heads='name', tasks=[...]."
        )
    if task_names is None:
        task_names = _short_names([name.rpartition(TO)[2] for name in names])
    if len(task_names) != len(modules):
        raise TaskError(
            f"found {len(task_names)} task names {task_names} for {len(modules)} heads {names}. Name each head once."
        )
    # Who gives a list says where each head ends.
    ends_given = isinstance(heads, (Sequence, Mapping)) and any(
        isinstance(head, (list, tuple)) for head in (heads.values() if isinstance(heads, Mapping) else heads)
    )
    goes_on = () if ends_given else tuple(continuations(model, names, modules))
    return Heads(tuple(check_task_names(task_names)), tuple(names), tuple(modules), columns=False, goes_on=goes_on)


def check_not_compiled(model: nn.Module, names: Sequence[str], heads: Sequence[nn.Module]) -> None:
    """Refuse heads of which a part is compiled, and compiled modules around them."""
    ids = {id(part) for head in heads for part in (head if isinstance(head, Branch) else [head])}
    compiled = next(
        (
            name or "the model"
            for name, module in model.named_modules()
            if is_compiled(module) and any(id(part) in ids for part in module.modules())
        ),
        None,
    )
    inside = (
        f"{name}.{inner}" if inner else name
        for name, head in zip(names, heads)
        for inner, module in head.named_modules()
        if is_compiled(module)
    )
    if compiled is None and (compiled := next(inside, None)) is None:
        return
    raise ConfigurationError(
        f"{compiled} is compiled by torch.compile, which has no second derivative and hides what hooks see. Compile "
        f"{_compilable(model, ids)}. If all heads are Linear layers on the feature itself, nothing is differentiated: then "
        "torch.compile(model) works, too, after the regularizer was attached to the model as it was."
    )


def _compilable(model: nn.Module, heads: set[int]) -> str:
    """Say what of this model can be compiled: the largest parts without heads."""
    while isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
        model = inner
    parts = [
        f"model.{name}.compile()"
        for name, child in model.named_children()
        if name.isidentifier()
        and next(child.parameters(), None) is not None
        and not is_container(child)
        and heads.isdisjoint(map(id, child.modules()))
    ]
    return f"the backbone alone: {', '.join(parts[:3])}" if parts else "the backbone alone, as a module of its own"


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has this module, as ``torch.compile(module)`` or ``module.compile()``."""
    # Not hasattr: a wrapper may pass unknown names on to a part of it.
    return "_orig_mod" in vars(module).get("_modules", {}) or vars(module).get("_compiled_call_impl") is not None


def columns_head(name: str, module: nn.Module, tasks: list[str] | None, groups: ColumnGroups | None) -> Heads:
    width = widths(module)[1]
    exact = isinstance(last_layer(module), (nn.Linear, nn.modules.conv._ConvNd))  # else it may be given another shape
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
    elif groups is not None and width is not None and exact:
        groups.of(width)
    elif groups is None and width is not None and width != len(tasks) and (exact or width % len(tasks)):
        size = 4 if width % len(tasks) else width // len(tasks)
        raise TaskError(
            f"tasks= has {len(tasks)} names, but {name!r} has {width} output columns. Name each column once; or, for "
            f"several columns of each task, leave tasks= out and pass which they are: columns={{{tasks[0]!r}: slice(0, "
            f"{size}), ...}}. By hand: regularizer(outputs=logits.view(-1, {len(tasks)}, {size}).unbind(1), "
            "features=feature)."
        )
    return Heads(tuple(tasks), (name,), (module,), columns=True, groups=groups)


def _expand(model: nn.Module, head: _OneHead, containers: bool = True) -> list[tuple[str, nn.Module]]:
    """Return the modules that one entry of ``heads=`` means; a container stands for its children."""
    if isinstance(head, str) and any(character in head for character in "*?["):
        return [(name, model.get_submodule(name)) for name in match_names(model, head, "head")]
    if containers and isinstance(head, (str, nn.Module)):
        name, module = find_module(model, head, "head")
        if isinstance(module, (nn.ModuleDict, nn.ModuleList)) and not isinstance(module, Branch):
            prefix = name + "." if name_of(model, module) == name else ""
            return [(prefix + child_name, child) for child_name, child in module.named_children()]
    return [one_head(model, head)]


def of_methods(heads: Heads, ran_inside: Callable[[str], Sequence[str]] = lambda name: ()) -> str:
    """Say what to name where methods of heads are called, for an error; ``ran_inside`` says which modules of a head ran."""
    parts: list[list[str]] = []
    for name, module in zip(heads.names, heads.modules):
        if isinstance(module, Branch):
            return ""
        inside = ran_inside(name) or [
            f"{name}.{child}" for child, part in module.named_children() if next(part.parameters(), None) is not None
        ]
        parts.append(list(inside) if len(inside) <= _MOST_NAMES else [inside[0], inside[-1]])
    if not all(parts):
        return ""
    given: list[str | list[str]] = [own[0] if len(own) == 1 else own for own in parts]
    if heads.columns:
        words = repr(given[0] if len(parts[0]) == 1 else given)
    else:
        named = [f"{task!r}: {own!r}" for task, own in zip(heads.tasks, given)]
        more = ["..."] if len(named) > _MOST_NAMES else []
        words = f"{{{', '.join([*named[:_MOST_NAMES], *more])}}}"
        words += " (for each task from where its head begins to its output)" if more else " (the keys name the tasks)"
    return (
        f" Where a method of a head is called, head.step(feature), not {heads.names[0]!r} itself, name the modules in it "
        f"that are called: heads={words}."
    )


def items_per_head(output: Item | Mapping[str, Item | None] | None, heads: Heads) -> list[tuple[Item, ...]]:
    """Return the way to each head's output in what it returns, as the public ``output=`` says."""
    if isinstance(output, Mapping):
        if heads.columns:
            raise TaskError(f"output= names {list(output)}, but {heads.names[0]!r} is one head. Pass output='logits'.")
        chosen = per_task(output, heads.tasks, "output=", "Pass a part for each head, or for all: output='logits'.")
        parts = [chosen.get(index) for index in range(len(heads.tasks))]
    else:
        parts = [output] * len(heads.modules)
    for part in parts:
        if isinstance(part, bool) or not (part is None or callable(part) or isinstance(part, (int, str))):
            raise WrongTypeError(
                f"output= must be a key, an attribute, an index or a function, or {{task: one of these}}, found "
                f"{type(part).__name__}."
            )
    return [() if part is None else (part,) for part in parts]


#: Between the names of a head of several modules.
TO = " to "
#: So many names are written out.
_MOST_NAMES = 6


def one_head(model: nn.Module, head: _OneHead) -> tuple[str, nn.Module]:
    if not isinstance(head, (list, tuple)):
        name, module = find_module(model, head, "head")  # type: ignore[arg-type]  # refused there
        if is_container(module):
            inside = [f"{name}.{child}" for child, _ in module.named_children()]
            raise HeadNotFoundError(
                f"{name!r} is a {type(module).__name__}, which is not called itself. Pass heads={name!r} alone for its "
                f"members, or those that you mean: {inside[:4]}. For heads of several modules pass a list for each, from "
                "where it begins to its output: heads={'a': ['towers.0', 'last.0'], ...}."
            )
        return name, module
    if not head:
        raise HeadNotFoundError(
            "heads= has an empty list. Name the modules of that head, the one with its output last."
        )
    parts = [find_module(model, part, "head") for part in head]
    if len(parts) == 1:
        return parts[0]
    return f"{parts[0][0]}{TO}{parts[-1][0]}", Branch([module for _, module in parts])


def check_disjoint(model: nn.Module, names: Sequence[str], modules: Sequence[nn.Module]) -> None:
    parts: list[tuple[str, nn.Module]] = []
    for name, module in zip(names, modules):
        parts += [(name_of(model, part), part) for part in module] if isinstance(module, Branch) else [(name, module)]
    for i, (name, module) in enumerate(parts):
        if module is model:
            raise TaskError(
                "the model itself was given as a head. Name the modules inside it that end in a task's output."
            )
        inside = {id(child) for child in module.modules()}
        for j, (other_name, other) in enumerate(parts):
            if i < j and other is module:
                raise TaskError(
                    f"head {name!r} was given twice. Each task needs a head of its own; what heads share is in front of "
                    f"them. For one module with the outputs of all tasks pass heads={name!r}, tasks=[...] if it returns "
                    f"[B, tasks] or [B, tasks, classes], else heads={name!r}, columns={{'a': slice(0, 4), ...}}."
                )
            if i != j and id(other) in inside:
                raise TaskError(
                    f"head {other_name!r} is part of head {name!r}. Choose heads that do not contain each other."
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
