"""The features of a trained backbone that stays as it is, each of mean 0 and standard deviation 1."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: Features that are the same for all samples stay so.
_LEAST_SPREAD = 1e-6


class FrozenFeatures(nn.Module):
    """Takes the place of a backbone: penalties on head weights mean nothing while features can grow as weights shrink.

    Args:
        backbone: from a batch of inputs to features ``[B, ...]``; always in eval mode, and without gradients.
        inputs: batches of the training samples, of which mean and standard deviation are taken.
    """

    def __init__(self, backbone: nn.Module, inputs: Iterable[Any]) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False).eval()
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        with torch.no_grad():
            for batch in inputs:
                features = backbone(batch).double()
                count += len(features)
                total = total + features.sum(0)
                squares = squares + features.square().sum(0)
            mean = total / count
            spread = (squares / count - mean.square()).clamp(min=0).sqrt()
        dtype = next(backbone.parameters()).dtype
        self.register_buffer("mean", mean.to(dtype))
        self.register_buffer("spread", torch.where(spread > _LEAST_SPREAD, spread, torch.ones_like(spread)).to(dtype))

    def forward(self, inputs: Any) -> Tensor:
        """``[B, ...]``."""
        with torch.no_grad():
            features: Tensor = (self.backbone(inputs) - self.mean) / self.spread
        return features

    def train(self, mode: bool = True) -> FrozenFeatures:
        """Statistics of normalisations in the backbone stay, too."""
        super().train(mode)
        self.backbone.eval()
        return self
