"""What a multi-task model returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...shared.libraries import need

_transformers = need("transformers")


@dataclass
class MultiTaskOutput(_transformers.utils.ModelOutput):  # type: ignore[misc,name-defined]
    """Losses and logits by task.

    Attributes:
        loss: 0-dim, the weighted sum of ``losses``; only with labels.
        logits: ``{task: [B, K]}``, ``[B, L, K]`` for token heads, without the last axis for one output.
        losses: ``{task: 0-dim}``, the mean over known labels; tasks without a known label in the batch are left out.
        hidden_states, attentions: of the encoder, if they were asked for.
    """

    loss: Tensor | None = None
    logits: dict[str, Tensor] | None = None
    losses: dict[str, Tensor] | None = None
    hidden_states: Any = None
    attentions: Any = None
