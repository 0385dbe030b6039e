"""From hidden states to one vector per sequence; padding does not enter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import EncoderError


class SequencePooling(nn.Module):
    """Pools ``[B, L, C]`` to ``[B, C]`` over the real positions, or passes on the encoder's own ``"pooler"`` output.

    ``"none"`` passes on all positions, padding as zeros.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden: Tensor, mask: Tensor | None = None, pooler: Tensor | None = None) -> Tensor:
        """Pool hidden states ``[B, L, C]`` where the mask ``[B, L]`` is true; a row without real positions gives zeros."""
        if self.kind == "pooler":
            if pooler is None:
                raise EncoderError("this encoder has no pooler output. Pass pooling='mean' or pooling='first'.")
            return pooler
        if mask is not None:
            # In place of a product with the mask: what a padded position holds may not be finite.
            hidden = hidden.masked_fill(~mask.unsqueeze(2), 0)
        if self.kind == "none":
            return hidden
        if self.kind == "mean":
            return hidden.mean(1) if mask is None else hidden.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(hidden)
        if mask is None:
            return hidden[:, 0 if self.kind == "first" else -1]
        # Padding may be on the left, too.
        length = hidden.shape[1]
        positions = torch.arange(length, device=hidden.device)
        place = torch.where(mask, length - positions if self.kind == "first" else positions + 1, 0).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), place]

    def extra_repr(self) -> str:
        return self.kind


class TaskHead(nn.Module):
    """Layers behind a pooling of this head alone, if it has one; a single output has no axis of its own."""

    def __init__(self, layers: nn.Module, pooling: SequencePooling | None, outputs: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.layers = layers
        self.outputs = outputs

    def forward(self, feature: Tensor, mask: Tensor | None = None) -> Tensor:
        """Bring ``[B, C]`` to ``[B, K]``, ``[B, L, C]`` to ``[B, L, K]``; without the last axis for one output."""
        if self.pooling is not None:
            feature = self.pooling(feature, mask)
        logits: Tensor = self.layers(feature)
        return logits.squeeze(-1) if self.outputs == 1 else logits
