"""Checks of what describes task heads, and their layers, for every integration that builds heads."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

from torch import nn

from ...errors import ConfigurationError, TaskError, WrongTypeError
from ...torch_tools import check_choice, share_below_one, whole_number

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}

#: Beyond any layer that fits into a memory.
_MOST = 10**8
_MOST_LAYERS = 64
_Config = TypeVar("_Config")


def set_checked(config: Any, outputs: str, **choices: Sequence[str]) -> None:
    """Check the fields that all heads have, and keep plain values, which a file can hold, in the frozen ``config``.

    ``outputs`` is its field with the number of outputs, ``choices`` are the values that further fields may have.
    """
    values: dict[str, Any] = {outputs: _size(outputs, getattr(config, outputs))}
    values["hidden"] = _checked_widths(config.hidden)
    for name, allowed in {"activation": tuple(ACTIVATIONS), **choices}.items():
        check_choice(name, getattr(config, name), allowed)
    if config.dropout is not None:
        values["dropout"] = share_below_one("dropout", config.dropout)
    for name, value in values.items():
        object.__setattr__(config, name, value)


def _checked_widths(hidden: object) -> tuple[int, ...]:
    if isinstance(hidden, (str, bytes)) or not isinstance(hidden, Iterable):
        raise WrongTypeError(
            f"hidden must be a tuple of widths, found {hidden!r}. Pass hidden=(64,) for one hidden layer."
        )
    widths = tuple(islice(hidden, _MOST_LAYERS + 1))
    if len(widths) > _MOST_LAYERS:
        raise ConfigurationError(f"hidden must be at most {_MOST_LAYERS} widths, found more. Pass one for each layer.")
    return tuple(_size("each width in hidden", width) for width in widths)


def _size(name: str, value: object) -> int:
    number = whole_number(name, value, least=1)
    if number > _MOST:
        raise ConfigurationError(f"{name} must be at most {_MOST}, found {number}. Pass the size of a layer.")
    return number


def check_number(name: str, value: object, *, above_zero: bool = False) -> None:
    """Raise an error for what is no finite number of at least 0, or above 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise WrongTypeError(f"{name} must be a number, found {value!r}.")
    if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
        least = "above 0" if above_zero else "at least 0"
        raise ConfigurationError(f"{name} must be finite and {least}, found {value}.")


def hidden_layers(width: int, hidden: Sequence[int], activation: str, rate: float, outputs: int) -> list[nn.Module]:
    """Return hidden layers with dropout behind each (or in front of the only ``Linear``), and the last ``Linear``."""
    layers: list[nn.Module] = []
    for each in hidden:
        layers += [nn.Linear(width, each), ACTIVATIONS[activation](), nn.Dropout(rate)]
        width = each
    if not hidden and rate:
        layers.append(nn.Dropout(rate))
    return [*layers, nn.Linear(width, outputs)]


def configs_per_task(
    heads: Any, head: _Config | None, kind: type[_Config], noun: str, with_outputs: Callable[[_Config, int], _Config]
) -> dict[str, _Config]:
    """Return one configuration of the class ``kind`` for each task, whose outputs are called ``noun``.

    ``heads`` is ``{task: number of outputs}``, ``{task: configuration}`` or a list of names; ``head`` has the other fields.
    """
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
    _check_task_names([task for task, _ in given])
    found = {}
    for task, description in given:
        if isinstance(description, kind):
            found[task] = description
        elif isinstance(description, numbers.Integral) and not isinstance(description, bool):
            number = whole_number(f"the number of {noun} of task {task!r}", description, least=1)
            found[task] = with_outputs(default, number)
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
