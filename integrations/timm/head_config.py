"""What a task head is made of."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

from torch import nn

from saliency_reg.errors import ConfigurationError, TaskError, WrongTypeError

__all__ = ["ACTIVATIONS", "NORMS", "POOLINGS", "HeadConfig", "HeadsDescription", "head_configs"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}
POOLINGS = ("auto", "average", "max", "average+max", "token", "none")
NORMS = ("auto", "layer", "none")


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A head: pooling, a norm, hidden layers, and a ``Linear`` with one output per class.

    Args:
        classes: number of outputs; 1 for a binary task or a regression, whose output is then ``[B]``.
        hidden: widths of the hidden layers; none for a linear head.
        activation: behind each hidden layer, ``"gelu"``, ``"relu"``, ``"tanh"`` or ``"silu"``. With ``"relu"``, as without
            hidden layers, the penalty trains the heads only.
        dropout: rate, behind each hidden layer, or in front of the only ``Linear``; ``None`` for the model's ``drop_rate``.
        pooling: over the positions of the feature map: ``"average"``, ``"max"``, their mean as ``"average+max"``, the class
            ``"token"``, ``"none"`` (all positions side by side, which fixes the image size), or ``"auto"``, which is what
            timm's own classifier does: class token, average or maximum; average in place of attention pooling.
        norm: of the pooled feature: ``"layer"`` (LayerNorm), ``"none"``, or ``"auto"``: a LayerNorm where timm's own
            classifier has one behind its pooling, beginning with the same weights.

    Raises:
        ConfigurationError, WrongTypeError: a value that makes no head.

    Example:
        >>> from saliency_reg.integrations.timm import HeadConfig
        >>> HeadConfig(classes=5, hidden=(64,)).activation
        'gelu'
    """

    classes: int = 1
    hidden: tuple[int, ...] = ()
    activation: str = "gelu"
    dropout: float | None = None
    pooling: str = "auto"
    norm: str = "auto"

    def __post_init__(self) -> None:
        check_count("classes", self.classes)
        if isinstance(self.hidden, (str, bytes)) or not isinstance(self.hidden, Iterable):
            raise WrongTypeError(
                f"hidden must be a tuple of widths, found {self.hidden!r}. Type hidden=(64,) for one hidden layer."
            )
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for width in self.hidden:
            check_count("each width in hidden", width)
        # Plain numbers, which a file can hold.
        object.__setattr__(self, "classes", int(self.classes))
        object.__setattr__(self, "hidden", tuple(map(int, self.hidden)))
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("norm", self.norm, NORMS)
        if self.dropout is not None:
            check_rate("dropout", self.dropout)
            object.__setattr__(self, "dropout", float(self.dropout))


#: What the public ``heads=`` accepts: ``{task: classes}``, ``{task: HeadConfig}``, or task names.
HeadsDescription = Union[Mapping[str, Union[int, HeadConfig]], Sequence[str]]


def head_configs(heads: HeadsDescription, head: HeadConfig | None) -> dict[str, HeadConfig]:
    """One configuration for each task.

    Args:
        heads: ``{task: classes}``, ``{task: HeadConfig}``, or a list of task names.
        head: what a number of classes, or a name alone, is filled up with.

    Raises:
        TaskError: no task, or names that cannot be used.
        WrongTypeError: something else.
    """
    default = HeadConfig() if head is None else head
    if not isinstance(default, HeadConfig):
        raise WrongTypeError(f"head must be a HeadConfig, found {type(head).__name__}. Type HeadConfig(hidden=(64,)).")
    if isinstance(heads, Mapping):
        given: list[tuple[Any, Any]] = list(heads.items())
    elif isinstance(heads, Sequence) and not isinstance(heads, (str, bytes)):
        given = [(task, default) for task in heads]
    else:
        raise WrongTypeError(
            f"heads must be {{task: number of classes}}, {{task: HeadConfig}} or a list of task names, found "
            f"{type(heads).__name__}. Type heads={{'smiling': 1, 'age': 5}}."
        )
    if not given:
        raise TaskError("heads is empty. Name at least one task: heads={'smiling': 1, 'young': 1}.")
    names = [task for task, _ in given]
    _check_task_names(names)
    found = {}
    for task, description in given:
        if isinstance(description, HeadConfig):
            found[task] = description
        elif isinstance(description, numbers.Integral) and not isinstance(description, bool):
            check_count(f"the number of classes of task {task!r}", description)
            found[task] = dataclasses.replace(default, classes=int(description))
        else:
            raise WrongTypeError(
                f"task {task!r} must have a number of classes or a HeadConfig, found {type(description).__name__}. Type "
                f"heads={{{task!r}: 1}}."
            )
    return found


def _check_task_names(names: Sequence[Any]) -> None:
    reserved = nn.ModuleDict()
    for task in names:
        if not isinstance(task, str):
            raise WrongTypeError(f"a task name must be a str, found {task!r}. Type {str(task)!r}.")
        if not task or "." in task:
            instead = task.replace(".", "_") or "task"
            raise TaskError(f"{task!r} cannot name a head: names are not empty and have no dot. Type {instead!r}.")
        if hasattr(reserved, task):
            raise TaskError(
                f"{task!r} cannot name a head: torch.nn.ModuleDict, which holds the heads, has an attribute of that name. "
                f"Type {task + '_task'!r}."
            )
    if doubled := sorted({task for task in names if names.count(task) > 1}):
        raise TaskError(f"the task names {doubled} occur more than once. Give each task a name of its own.")


def check_count(what: str, value: object) -> None:
    """A whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise WrongTypeError(f"{what} must be an int, found {value!r}.")
    if value < 1:
        raise ConfigurationError(f"{what} must be at least 1, found {value}.")


def check_rate(what: str, value: object) -> None:
    """A number in ``[0, 1)``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise WrongTypeError(f"{what} must be a number, found {value!r}.")
    if not 0 <= float(value) < 1:
        raise ConfigurationError(f"{what} must be at least 0 and below 1, found {value}.")


def check_choice(what: str, value: object, allowed: Sequence[str]) -> None:
    """One of the names that are allowed."""
    if value not in allowed:
        raise ConfigurationError(f"unknown {what} {value!r}. Choose one of {', '.join(map(repr, allowed))}.")
