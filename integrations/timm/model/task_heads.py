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
    own = own_pooling(backbone.model, layout)
    kinds = {task: own if config.pooling == "auto" else config.pooling for task, config in configs.items()}
    poolings = {task: FeaturePooling(layout, kind) for task, kind in kinds.items()}
    shared = len(set(kinds.values())) == 1 and "none" not in kinds.values()
    heads = {}
    for task, config in configs.items():
        layers: list[nn.Module] = [] if shared else [poolings[task]]
        width = pooled_width(layout, kinds[task])
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
        heads[task] = nn.Sequential(*layers)
    return next(iter(poolings.values())) if shared else nn.Identity(), nn.ModuleDict(heads)
