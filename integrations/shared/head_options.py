"""What every integration that builds task heads asks of the arguments that describe them."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from ...errors import TaskError, WrongTypeError
from ...torch_tools import whole_number

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}

_Config = TypeVar("_Config")


def checked_widths(hidden: object) -> tuple[int, ...]:
    """Widths of hidden layers, as plain numbers, which a file can hold."""
    if isinstance(hidden, (str, bytes)) or not isinstance(hidden, Iterable):
        raise WrongTypeError(
            f"hidden must be a tuple of widths, found {hidden!r}. Pass hidden=(64,) for one hidden layer."
        )
    return tuple(whole_number("each width in hidden", width, least=1) for width in hidden)


def hidden_layers(width: int, hidden: Sequence[int], activation: str, rate: float, outputs: int) -> list[nn.Module]:
    """Hidden layers with dropout behind each (or in front of the only ``Linear``), and a ``Linear`` to the outputs."""
    layers: list[nn.Module] = []
    for each in hidden:
        layers += [nn.Linear(width, each), ACTIVATIONS[activation](), nn.Dropout(rate)]
        width = each
    if not hidden and rate:
        layers.append(nn.Dropout(rate))
    return [*layers, nn.Linear(width, outputs)]


def configs_per_task(heads: Any, head: _Config | None, kind: type[_Config], outputs: str) -> dict[str, _Config]:
    """One configuration for each task.

    Args:
        heads: ``{task: number of outputs}``, ``{task: configuration}``, or a list of task names.
        head: what a number of outputs, or a name alone, is filled up with.
        kind: the class of configurations.
        outputs: its field with the number of outputs.

    Raises:
        TaskError: no task, or names that cannot be used.
        WrongTypeError: something else.
    """
    noun = outputs.removeprefix("num_")
    default = kind() if head is None else head
    if not isinstance(default, kind):
        raise WrongTypeError(
            f"head must be a {kind.__name__}, found {type(head).__name__}. Use {kind.__name__}(hidden=(64,))."
        )
    if isinstance(heads, Mapping):
        given: list[tuple[Any, Any]] = list(heads.items())
    elif isinstance(heads, Sequence) and not isinstance(heads, (str, bytes)):
        given = [(task, default) for task in heads]
    else:
        raise WrongTypeError(
            f"heads must be {{task: number of {noun}}}, {{task: {kind.__name__}}} or a list of task names, found "
            f"{type(heads).__name__}. Pass heads={{'smiling': 1, 'age': 5}}."
        )
    if not given:
        raise TaskError("heads is empty. Name at least one task: heads={'smiling': 1, 'young': 1}.")
    names = [task for task, _ in given]
    _check_task_names(names)
    found = {}
    for task, description in given:
        if isinstance(description, kind):
            found[task] = description
        elif isinstance(description, numbers.Integral) and not isinstance(description, bool):
            whole_number(f"the number of {noun} of task {task!r}", description, least=1)
            found[task] = dataclasses.replace(default, **{outputs: int(description)})  # type: ignore[type-var]
        else:
            raise WrongTypeError(
                f"task {task!r} must have a number of {noun} or a {kind.__name__}, found {type(description).__name__}. Pass "
                f"heads={{{task!r}: 1}}."
            )
    return found


def _check_task_names(names: Sequence[Any]) -> None:
    reserved = nn.ModuleDict()
    for task in names:
        if not isinstance(task, str):
            raise WrongTypeError(f"a task name must be a str, found {task!r}. Use {str(task)!r}.")
        if not task or "." in task:
            instead = task.replace(".", "_") or "task"
            raise TaskError(f"{task!r} cannot name a head: names are not empty and have no dot. Use {instead!r}.")
        if hasattr(reserved, task):
            raise TaskError(
                f"{task!r} cannot name a head: torch.nn.ModuleDict, which holds the heads, has an attribute of that name. "
                f"Use {task + '_task'!r}."
            )
    if doubled := sorted({task for task in names if names.count(task) > 1}):
        raise TaskError(f"the task names {doubled} occur more than once. Give each task a name of its own.")
