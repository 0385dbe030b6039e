"""From a feature map to one vector per image."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ....errors import ConfigurationError, ShapeError
from ..backbone.feature_layout import FeatureLayout

#: timm's names of poolings, and ours.
_OURS = {
    "avg": "average",
    "fast": "average",
    "fastavg": "average",
    "max": "max",
    "avgmax": "average+max",
    "fastavgmax": "average+max",
    "token": "token",
}


class FeaturePooling(nn.Module):
    """Pools a feature map ``[B, ...]`` to ``[B, C]``, or to all entries ``[B, L * C]`` for ``"none"``.

    ``"token"`` is the first prefix token; for the averages and maxima, prefix tokens do not count.
    """

    def __init__(self, layout: FeatureLayout, kind: str) -> None:
        super().__init__()
        if kind == "token" and not layout.num_prefix_tokens:
            raise ConfigurationError(
                f"pooling='token' needs a class token, and this backbone has none ({layout.describe()}). Pass "
                "pooling='average'."
            )
        if kind in ("average", "max", "average+max") and not layout.spatial and layout.num_prefix_tokens:
            raise ConfigurationError(
                f"pooling={kind!r} needs positions, and this backbone returns class tokens only ({layout.describe()}). Pass "
                "pooling='token'."
            )
        self.layout = layout
        self.kind = kind

    def forward(self, feature: Tensor) -> Tensor:
        """Return ``[B, C]`` (``[B, L*C]`` for ``"none"``) of a feature with the axes of the layout."""
        sequence = self.layout.to_sequence(feature)
        if self.kind == "token":
            return sequence[:, 0]
        if self.kind == "none":
            if sequence.shape[1:] != (expected := (max(self.layout.positions, 1), self.layout.channels)):
                raise ShapeError(
                    f"pooling='none' was built for {expected[0]} positions of {expected[1]} channels, found "
                    f"{sequence.shape[1]} of {sequence.shape[2]}. Use images of the size that the model was built with "
                    "(image_size=), or pooling='average'."
                )
            return sequence.flatten(1)
        sequence = sequence[:, self.layout.num_prefix_tokens :]
        if self.kind == "average":
            return sequence.mean(1)
        if self.kind == "max":
            return sequence.amax(1)
        return 0.5 * (sequence.mean(1) + sequence.amax(1))

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.layout.describe()}"


def pooled_width(layout: FeatureLayout, kind: str) -> int:
    """Return the number of entries per image behind the pooling."""
    return layout.channels * max(layout.positions, 1) if kind == "none" else layout.channels


def own_pooling(model: nn.Module, layout: FeatureLayout) -> str:
    """Return our name of what timm's own classifier does; average for attention pooling and whatever has no name here."""
    for holder in (model, getattr(model, "head", None)):
        pool: Any = getattr(holder, "global_pool", None)
        name = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
        if isinstance(name, str) and name in _OURS:
            found = _OURS[name]
            if found == "token" and not layout.num_prefix_tokens:
                break
            return found if layout.spatial or not layout.num_prefix_tokens else "token"
    return "average" if layout.spatial or not layout.num_prefix_tokens else "token"
