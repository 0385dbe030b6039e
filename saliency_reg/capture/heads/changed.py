"""The heads of a model in which a task has come or gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...errors import HeadNotFoundError, TaskError, WrongTypeError
from ...tasks import check_task_names
from ..lookup import find_module, listed, name_of
from .branches import Branch, continuations
from .column_groups import ColumnGroups
from .head_search import is_container, last_layer, widths
from .resolve import TO, Heads, check_disjoint, check_not_compiled, columns_head, one_head


def heads_with(heads: Heads, model: nn.Module, task: str, head: Any = None, columns: Any = None) -> Heads:
    """Return the heads with one more, of a task that comes last.

    ``head`` is the new one, or the one with the outputs of all tasks; it is looked for where the others are. ``columns`` are
    those of the new task in it, or of all.
    """
    tasks = check_task_names([*heads.tasks, task])
    if heads.columns:
        return _with_columns(heads, model, tasks, head, columns)
    if columns is not None:
        raise TaskError(
            "columns= are those of one head for all tasks, and here each task has a head. Leave columns= out."
        )
    names, modules = _still_there(heads, model, heads.tasks)
    name, module = one_head(model, _place_of(heads, model, names, task) if head is None else head)
    return _separate(heads, model, tasks, [*names, name], [*modules, module])


def heads_without(heads: Heads, model: nn.Module, task: str, head: Any = None, columns: Any = None) -> Heads:
    """Return the heads but for that of a task; see :func:`heads_with`."""
    tasks = check_task_names([one for one in heads.tasks if one != task])
    if heads.columns:
        return _with_columns(heads, model, tasks, head, columns)
    if columns is not None or head is not None:
        raise TaskError("head= and columns= are for one head with the outputs of all tasks. Leave them out.")
    return _separate(heads, model, tasks, *_still_there(heads, model, tasks))


def _separate(
    heads: Heads, model: nn.Module, tasks: Sequence[str], names: Sequence[str], modules: Sequence[nn.Module]
) -> Heads:
    check_not_compiled(model, names, modules)
    check_disjoint(model, names, modules)
    goes_on = tuple(continuations(model, names, modules)) if heads.goes_on else ()
    return Heads(tuple(tasks), tuple(names), tuple(modules), columns=False, goes_on=goes_on)


def _still_there(heads: Heads, model: nn.Module, tasks: Sequence[str]) -> tuple[list[str], list[nn.Module]]:
    """Return the heads of some tasks with their names in the model as it is now."""
    names_now = {id(module): name for name, module in reversed(list(model.named_modules()))}
    names, modules = [], []
    for task, name, module in zip(heads.tasks, heads.names, heads.modules):
        if task not in tasks:
            continue
        parts = list(module) if isinstance(module, Branch) else [module]
        ends = name.split(TO)
        # One that never was in the model has the name of its class.
        were_inside = [own != type(part).__name__ for own, part in zip((ends[0], ends[-1]), (parts[0], parts[-1]))]
        if any(was and id(part) not in names_now for was, part in zip(were_inside, (parts[0], parts[-1]))):
            raise HeadNotFoundError(
                f"the head {name!r} of task {task!r} is not in the model any more: it was replaced or taken away. Put it "
                f"back, or call remove_task({task!r}) before, and add_task({task!r}) for the new one."
            )
        own = [names_now.get(id(part), type(part).__name__) for part in (parts[0], parts[-1])]
        names.append(own[0] if len(parts) == 1 else TO.join(own))
        modules.append(module)
    return names, modules


def _place_of(heads: Heads, model: nn.Module, names: Sequence[str], task: str) -> str:
    """Return the name of the new head: that of another with one task in place of the other, or what nobody has yet."""
    known = {name for name, _ in model.named_modules()}
    wanted: list[str] = []
    for own, name in zip(heads.tasks, names):
        parts = name.split(".")
        wanted += [".".join([*parts[:at], task, *parts[at + 1 :]]) for at, part in enumerate(parts) if part == own]
    found = dict.fromkeys(name for name in wanted if name in known and name not in names)
    around = {name.rpartition(".")[0] for name in names}
    holder = model.get_submodule(around.pop()) if len(around) == 1 and TO not in "".join(names) else None
    if not found and holder is not None and is_container(holder):
        prefix = names[0].rpartition(".")[0]
        children = [f"{prefix}.{child}" if prefix else child for child, _ in holder.named_children()]
        found = dict.fromkeys(name for name in children if name not in names)
    if len(found) == 1:
        return next(iter(found))
    what = f"several modules may be it: {listed(map(repr, found))}" if found else "there is none"
    where = f" (looked for {listed(map(repr, dict.fromkeys(wanted)), 4)})" if wanted else ""
    raise HeadNotFoundError(
        f"the head of the new task {task!r} was not found{where}: {what}. Put it into the model first, e.g. "
        f"model.heads[{task!r}] = nn.Linear(...), or name it: add_task({task!r}, head='name')."
    )


def _with_columns(heads: Heads, model: nn.Module, tasks: list[str], head: Any, columns: Any) -> Heads:
    name, module = _whole_head(heads, model) if head is None else find_module(model, head, "head")
    same = module is heads.modules[0]
    width = widths(module)[1]
    layer = last_layer(module)
    exact = isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) and width is not None
    groups = _groups(heads, tasks, name, columns, same)
    if groups is None and exact and width != len(tasks):
        raise TaskError(
            f"head {name!r} has {width} columns, and the tasks are now {tasks}. Put a {type(layer).__name__} with "
            f"{len(tasks)} columns in its place before, in this order, with the weights of the tasks that stay; or say "
            f"which columns are those of each task: columns={{{tasks[0]!r}: 0, ...}}."
        )
    check_not_compiled(model, [name], [module])
    check_disjoint(model, [name], [module])
    return columns_head(name, module, tasks, groups)


def _whole_head(heads: Heads, model: nn.Module) -> tuple[str, nn.Module]:
    """Return the head with the outputs of all tasks: as it was, or what is in its place now."""
    if any(module is heads.modules[0] for module in model.modules()):
        return name_of(model, heads.modules[0]), heads.modules[0]
    known = {name for name, _ in model.named_modules()}
    was = heads.names[0]
    return find_module(model, was if was in known else was.removeprefix("module."), "head")


def _groups(heads: Heads, tasks: list[str], name: str, columns: Any, same: bool) -> ColumnGroups | None:
    given: dict[str, Any] = {} if heads.groups is None else heads.groups.given
    comes = next((task for task in tasks if task not in heads.tasks), None)
    if isinstance(columns, Mapping):
        if set(map(str, columns)) != set(tasks):
            raise TaskError(f"columns= names {list(columns)}, but the tasks are {tasks}. Name the columns of each.")
        given = {str(task): own for task, own in columns.items()}
    elif columns is not None and comes is None:
        raise WrongTypeError(f"columns must be a mapping {{task: columns}} for the tasks {tasks}, found {columns!r}.")
    elif heads.groups is None and columns is None:
        return None
    elif heads.groups is None:
        raise TaskError(
            f"head {name!r} has had a column for each task, so one may now be anywhere. Name those of all tasks: "
            f"columns={{{tasks[0]!r}: 0, ..., {tasks[-1]!r}: {columns!r}}}; or leave columns= out, for one more column, "
            "the last."
        )
    elif comes is not None and columns is None:
        raise TaskError(
            f"it is not known which columns of head {name!r} are those of {comes!r}. Pass them: "
            f"add_task({comes!r}, columns=slice(4, 8)), or columns={{task: ...}} for all tasks."
        )
    elif comes is None and not same:
        raise TaskError(
            f"head {name!r} is another module now, in which the columns may be others. Pass columns={{task: ...}} for the "
            f"tasks {tasks}."
        )
    else:
        given = {**given, **({} if comes is None else {comes: columns})}
    return ColumnGroups({task: given[task] for task in tasks})
