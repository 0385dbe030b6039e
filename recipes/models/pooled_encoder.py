"""An encoder of texts as a backbone: one vector of each text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saliency_reg.integrations.transformers import HeadConfig, MultiTaskModel


class PooledEncoder(nn.Module):
    """An encoder of transformers with its pooling, from a batch of tokens to ``[B, width]``.

    Args:
        encoder: hub id, folder, or configuration for new weights.

    Raises:
        SaliencyRegError: an encoder that cannot be loaded or built.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        # Knows how each kind of encoder is called and pooled.
        self.model = MultiTaskModel.from_encoder(encoder, ["feature"], head=HeadConfig(hidden=()))
        self.model.heads = nn.ModuleDict({"feature": _Feature()})
        self.width: int = self.model.hidden_width

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """``[B, width]``; tokens have ``"input_ids"`` and ``"attention_mask"``, both ``[B, L]``."""
        feature: Tensor = self.model(**tokens).logits["feature"]
        return feature


class _Feature(nn.Module):
    """In place of a head: passes on what it reads."""

    def forward(self, feature: Tensor, mask: Tensor | None = None) -> Tensor:
        del mask
        return feature
