"""Building task heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...shared.head_options import hidden_layers
from .encoder import is_decoder_only
from .head_config import HeadConfig
from .pooling import SequencePooling, TaskHead


def build_heads(
    configs: Mapping[str, HeadConfig], encoder_config: Any, width: int, *, is_part: bool
) -> tuple[SequencePooling, nn.ModuleDict]:
    """Return what pools for all heads, and the heads; ``is_part`` says whether the encoder is that of an encoder-decoder."""
    kinds = {task: pooling_of(config, encoder_config, is_part=is_part) for task, config in configs.items()}
    shared = next(iter(kinds.values())) if len(set(kinds.values())) == 1 else "none"
    heads = {task: build_head(configs[task], kind, shared, encoder_config, width) for task, kind in kinds.items()}
    return SequencePooling(shared), nn.ModuleDict(heads)


def pooling_of(config: HeadConfig, encoder_config: Any, *, is_part: bool) -> str:
    """Return how a head pools: ``"none"`` for one on tokens."""
    if config.level == "token":
        return "none"
    own = "last" if not is_part and is_decoder_only(encoder_config) else "mean"
    return own if config.pooling == "auto" else config.pooling


def build_head(config: HeadConfig, kind: str, shared: str, encoder_config: Any, width: int) -> TaskHead:
    """Return one head that pools by ``kind``, where all have pooled by ``shared`` before."""
    rate = _dropout_of(encoder_config) if config.dropout is None else config.dropout
    layers = nn.Sequential(*hidden_layers(width, config.hidden, config.activation, rate, config.num_labels))
    return TaskHead(layers, None if kind == shared else SequencePooling(kind), config.num_labels)


def _dropout_of(config: Any) -> float:
    """Return the dropout that transformers' own classifier on this encoder has."""
    for name in ("classifier_dropout", "seq_classif_dropout", "classifier_dropout_prob", "hidden_dropout_prob"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1:
            return float(value)
    return 0.0
