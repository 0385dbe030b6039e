"""Building task heads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .backbone import Backbone
from .head_config import ACTIVATIONS, HeadConfig
from .pooling import FeaturePooling, own_pooling, pooled_width

__all__ = ["build_heads"]


def build_heads(configs: Mapping[str, HeadConfig], backbone: Backbone, drop_rate: float) -> nn.ModuleDict:
    """A head for each task; see :class:`HeadConfig`.

    Args:
        configs: of the tasks.
        backbone: whose feature map all heads read, and whose own pooling and norm are meant by ``"auto"``.
        drop_rate: for heads that have no dropout of their own.

    Raises:
        ConfigurationError: a pooling that the layout does not allow.
    """
    layout = backbone.layout
    heads = {}
    for task, config in configs.items():
        kind = own_pooling(backbone.model, layout) if config.pooling == "auto" else config.pooling
        layers: list[nn.Module] = [FeaturePooling(layout, kind)]
        width = pooled_width(layout, kind)
        if config.norm == "layer":
            layers.append(nn.LayerNorm(width))
        elif (
            config.norm == "auto" and (norm := backbone.pooled_norm()) is not None and norm.normalized_shape == (width,)
        ):
            layers.append(norm)
        rate = drop_rate if config.dropout is None else config.dropout
        for hidden in config.hidden:
            layers += [nn.Linear(width, hidden), ACTIVATIONS[config.activation](), nn.Dropout(rate)]
            width = hidden
        if not config.hidden and rate:
            layers.append(nn.Dropout(rate))
        layers.append(nn.Linear(width, config.classes))
        if config.classes == 1:
            # [B, 1] -> [B]: beside labels [B], a loss would broadcast to [B, B] without a word.
            layers.append(nn.Flatten(0))
        heads[task] = nn.Sequential(*layers)
    return nn.ModuleDict(heads)
