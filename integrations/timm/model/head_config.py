"""The description of a task head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Union

from ...shared.head_options import configs_per_task, set_checked

_POOLINGS = ("auto", "average", "max", "average+max", "token", "none")
_NORMS = ("auto", "layer", "none")


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
        set_checked(self, "classes", pooling=_POOLINGS, norm=_NORMS)


#: What the public ``heads=`` accepts: ``{task: classes}``, ``{task: HeadConfig}``, or task names.
HeadsDescription = Union[Mapping[str, Union[int, HeadConfig]], Sequence[str]]


def head_configs(heads: HeadsDescription, head: HeadConfig | None) -> dict[str, HeadConfig]:
    """Return one configuration for each task; ``head`` has what a number of classes, or a name alone, leaves open."""
    return configs_per_task(heads, head, HeadConfig, "classes", _with_classes)


def _with_classes(head: HeadConfig, number: int) -> HeadConfig:
    return dataclasses.replace(head, classes=number)
