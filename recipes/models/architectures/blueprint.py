"""What a data set gives: a backbone and heads, from which every architecture is built."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...runtime.errors import OptionError


@dataclass(frozen=True)
class Blueprint:
    """How to make the parts of a model of T tasks, with weights from torch's global generator.

    Attributes:
        tasks: T different names, in the order of the labels; any words, also with dots.
        backbone: makes a backbone, from inputs ``[B, ...]`` to a feature map ``[B, D]`` or ``[B, D, ...]``.
        head: makes the head of a task on such a feature map, with outputs ``[B]`` for a binary task or a number, ``[B, K]``
            for K classes.
        width: of what ``vector`` gives, 1 or more.
        tower: makes a head with the same outputs, and of the same kind, on vectors ``[B, width]`` of the width it is told.
        vector: makes a module without parameters from a feature map to vectors ``[B, width]``: pooling, or ``Flatten``.
        example: an input ``[1, ...]``, if inputs are tensors: backbones are cut into stages on it.

    Raises:
        OptionError: no task, a name twice, or no width.
    """

    tasks: tuple[str, ...]
    backbone: Callable[[], nn.Module]
    head: Callable[[str], nn.Module]
    width: int
    tower: Callable[[str, int], nn.Module]
    vector: Callable[[], nn.Module]
    example: Tensor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise OptionError(f"a blueprint needs one task or more, each with a name of its own; found {self.tasks!r}.")
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise OptionError(f"the width of a blueprint must be a whole number from 1 on; found {self.width!r}.")


def equal_backbones(blueprint: Blueprint) -> list[nn.Module]:
    """One new backbone, and copies of it: one for each task, all with the same weights.

    The same weights as those of hard sharing with the same seed. Units and weights of different backbones then mean the
    same, so that mixing, averaging or subtracting them makes sense.
    """
    first = blueprint.backbone()
    return [first, *(copy.deepcopy(first) for _ in blueprint.tasks[1:])]
