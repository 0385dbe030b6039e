"""What a task head is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Union

from ....torch_tools import check_choice, share_below_one, whole_number
from ...shared.head_options import ACTIVATIONS, checked_widths, configs_per_task

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
        whole_number("classes", self.classes, least=1)
        object.__setattr__(self, "hidden", checked_widths(self.hidden))
        # Plain numbers, which a file can hold.
        object.__setattr__(self, "classes", int(self.classes))
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("pooling", self.pooling, POOLINGS)
        check_choice("norm", self.norm, NORMS)
        if self.dropout is not None:
            share_below_one("dropout", self.dropout)
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
    return configs_per_task(heads, head, HeadConfig, "classes")
