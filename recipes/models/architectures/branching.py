"""Branching: hard sharing that is split in the course of a training, so that tasks that differ share lower stages alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saliency_reg import BranchingModel

from ...runtime.errors import OptionError
from .blueprint import Blueprint


class Branching(BranchingModel):
    """A :class:`saliency_reg.BranchingModel` (Lu et al., CVPR 2017) that begins as hard sharing of the blueprint.

    Tasks are numbered within: names such as "type" or "a.b" cannot be those of modules.

    Args:
        blueprint: of backbone and heads, with an example.

    Raises:
        OptionError: no example.
        BackboneCutError: a backbone that cannot be cut into stages.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        if blueprint.example is None:
            raise OptionError(
                "a backbone can be cut into stages on an example alone, which must be one tensor, and this blueprint has "
                "none. Choose other data, or another method."
            )
        backbone = blueprint.backbone()
        heads = {str(number): blueprint.head(task) for number, task in enumerate(blueprint.tasks)}
        super().__init__(backbone, heads, blueprint.example)
        self.names = blueprint.tasks

    def forward(self, x: Any) -> dict[str, Tensor]:
        """``{task: [B] or [B, K]}``."""
        outputs = super().forward(x)
        return {name: outputs[task] for name, task in zip(self.names, self.tasks)}
