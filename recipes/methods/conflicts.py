"""How often task gradients point against each other, measured in the same way for every method."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from saliency_reg import FeatureSurgery


class ConflictWatch:
    """Looks at the gradients of binary tasks at the feature map, and leaves the training alone.

    Args:
        model: with a ``backbone`` and ``heads``, before anything was attached to it. The heads are copied, so that what it
            is trained with stays apart.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._heads: nn.ModuleDict = copy.deepcopy(model.heads)
        # Of its weights only the report is used: no gradient leaves the heads.
        # Every process sees all examples.
        self._surgery = FeatureSurgery(nn.ModuleDict({"heads": self._heads}), heads="heads", process_group="local")

    def measure(self, inputs: Tensor, labels: Tensor) -> float:
        """Share of the pairs of tasks whose gradients conflict, on all examples at once; NaN if there is none to see."""
        self._heads.load_state_dict(self._model.heads.state_dict())
        self._heads.zero_grad()
        with torch.no_grad():
            feature = self._model.backbone(inputs)
        feature.requires_grad_()
        losses = [
            functional.binary_cross_entropy_with_logits(head(feature).squeeze(1), truth)
            for head, truth in zip(self._heads.values(), labels.unbind(1))
        ]
        torch.stack(losses).sum().backward()
        report = self._surgery.report
        return float("nan") if report is None else report.conflicts
