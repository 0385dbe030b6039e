"""Building task heads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ...shared.head_options import hidden_layers
from ..backbone.backbone import Backbone
from .head_config import HeadConfig
from .pooling import FeaturePooling, own_pooling, pooled_width


def build_heads(
    configs: Mapping[str, HeadConfig], backbone: Backbone, drop_rate: float
) -> tuple[nn.Module, nn.ModuleDict]:
    """Return what pools the feature map for all tasks, and a head for each task; see :class:`HeadConfig`.

    Heads with the same pooling share it. Then what they read is one vector per image: summed over positions, the saliency
    at the map is that at the vector, for every pooling but ``"none"``, and to take it there is H * W times cheaper. Heads
    with different poolings each have their own, and what pools for all does nothing.
    """
    layout = backbone.layout
    kinds = {task: pooling_of(config, backbone) for task, config in configs.items()}
    shared = len(set(kinds.values())) == 1 and "none" not in kinds.values()
    heads = {task: build_head(config, backbone, drop_rate, pools=not shared) for task, config in configs.items()}
    pooling = FeaturePooling(layout, next(iter(kinds.values()))) if shared else nn.Identity()
    return pooling, nn.ModuleDict(heads)


def pooling_of(config: HeadConfig, backbone: Backbone) -> str:
    """Return how a head pools; ``"auto"`` is timm's own way."""
    return own_pooling(backbone.model, backbone.layout) if config.pooling == "auto" else config.pooling


def build_head(config: HeadConfig, backbone: Backbone, drop_rate: float, *, pools: bool) -> nn.Sequential:
    """Return one head; ``pools`` says whether it has a pooling of its own."""
    kind = pooling_of(config, backbone)
    pooling = FeaturePooling(backbone.layout, kind)  # which refuses what this backbone does not have
    layers: list[nn.Module] = [pooling] if pools else []
    width = pooled_width(backbone.layout, kind)
    norm = backbone.pooled_norm() if config.norm == "auto" else None
    if config.norm == "layer":
        layers.append(nn.LayerNorm(width))
    elif norm is not None and norm.normalized_shape == (width,):
        layers.append(norm)
    rate = drop_rate if config.dropout is None else config.dropout
    layers += hidden_layers(width, config.hidden, config.activation, rate, config.classes)
    if config.classes == 1:
        # [B, 1] -> [B]: beside labels [B], a loss would broadcast to [B, B] without a word.
        layers.append(nn.Flatten(0))
    return nn.Sequential(*layers)


def pool_apart(pooling: FeaturePooling, heads: nn.ModuleDict) -> nn.Module:
    """Give each head the pooling that they share; return what then pools for all, which does nothing."""
    for head in heads.values():
        assert isinstance(head, nn.Sequential)
        head.insert(0, FeaturePooling(pooling.layout, pooling.kind))
    return nn.Identity()
