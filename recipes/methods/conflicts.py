"""How often task gradients point against each other, measured in the same way for every method."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import copy

import torch

from saliency_reg import FeatureSurgery

from ..data.digits import Examples
from ..models.small_networks import SharedNetwork, task_losses

__all__ = ["ConflictWatch"]


class ConflictWatch:
    """Looks at the task gradients at the feature map, and leaves the training alone.

    Args:
        model: before anything was attached to it. Its heads are copied, so that what it is trained with stays apart.
    """

    def __init__(self, model: SharedNetwork) -> None:
        self._model = model
        self._heads = copy.deepcopy(model.heads)
        # Of its weights only the report is used: no gradient leaves the heads.
        # Every process sees all examples.
        self._surgery = FeatureSurgery(
            torch.nn.ModuleDict({"heads": self._heads}), heads="heads", process_group="local"
        )

    def measure(self, examples: Examples) -> float:
        """Share of the pairs of tasks whose gradients conflict, on all examples at once; NaN if there is none to see."""
        self._heads.load_state_dict(self._model.heads.state_dict())
        self._heads.zero_grad()
        with torch.no_grad():
            feature = self._model.backbone(examples.inputs)
        feature.requires_grad_()
        logits = {task: head(feature).squeeze(1) for task, head in self._heads.items()}
        torch.stack(task_losses(logits, examples.labels)).sum().backward()
        report = self._surgery.report
        return float("nan") if report is None else report.conflicts
