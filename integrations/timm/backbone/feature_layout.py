"""Where a feature map has its channels, its positions and its prefix tokens."""

# ruff: noqa: ARG002  (one signature for all layouts)
from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import ShapeError
from ....torch_tools import derives_from
from ..errors import NoSpatialFeatureError

Size = tuple[int, int]
#: The most class, distillation and register tokens that are looked for where a model does not tell their number.
_MOST_PREFIX_TOKENS = 8
#: Models whose features are, but for the last one, hidden states. Their shapes do not tell.
_WITH_HIDDEN_STATES = {"EfficientViM"}


@dataclass(frozen=True)
class FeatureLayout(ABC):
    """How the entries of a feature map ``[B, ...]`` are arranged; a further arrangement is a further subclass."""

    channels: int
    #: ``(H, W)`` of the positions for the image of the probe; ``None`` if there are none.
    grid: Size | None
    #: Tokens in front of the positions: class, distillation, register.
    num_prefix_tokens: int = 0

    #: Of a feature, counted with the batch axis.
    channel_axis = 1

    @property
    def spatial(self) -> bool:
        """Whether the feature has positions."""
        return self.grid is not None

    @property
    def positions(self) -> int:
        """Entries per channel, prefix tokens included, for the image of the probe."""
        return self.num_prefix_tokens + (math.prod(self.grid) if self.grid is not None else 0)

    @abstractmethod
    def to_maps(self, feature: Tensor, image_size: Size) -> Tensor:
        """Bring ``[B, ...]`` to ``[B, C, H, W]`` without prefix tokens; the shape of the images tells the grid of tokens."""

    def gradient_to_maps(self, gradient: Tensor, image_size: Size) -> Tensor:
        """Bring the gradient at a feature to that at its :meth:`to_maps`."""
        return self.to_maps(gradient, image_size)

    def to_sequence(self, feature: Tensor) -> Tensor:
        """Bring ``[B, ...]`` to ``[B, L, C]``, prefix tokens first."""
        return feature.flatten(2).transpose(1, 2)

    def prefix(self, feature: Tensor) -> Tensor:
        """Return the prefix tokens ``[B, P, C]``."""
        return self.to_sequence(feature)[:, : self.num_prefix_tokens]

    def join(self, features: Any, image_size: Size) -> Tensor:
        """Return one tensor of what the backbone returned."""
        if not isinstance(features, Tensor):
            raise ShapeError(
                f"the backbone returned a {type(features).__name__}, expected a tensor as in the probe at construction."
            )
        return features

    def describe(self) -> str:
        """Return axes, channels and positions, for a person."""
        grid = "no positions" if self.grid is None else f"{self.grid[0]}x{self.grid[1]} positions"
        prefix = f", {self.num_prefix_tokens} prefix tokens" if self.num_prefix_tokens else ""
        return f"{self.axes}, {self.channels} channels, {grid}{prefix}"

    @property
    @abstractmethod
    def axes(self) -> str:
        """The axes by name, e.g. ``[B, C, H, W]``."""


@dataclass(frozen=True)
class ChannelsFirst(FeatureLayout):
    """``[B, C, H, W]``."""

    axes = "[B, C, H, W]"

    def to_maps(self, feature: Tensor, image_size: Size) -> Tensor:
        return feature


@dataclass(frozen=True)
class ChannelsLast(FeatureLayout):
    """``[B, H, W, C]``."""

    axes = "[B, H, W, C]"
    channel_axis = 3

    def to_maps(self, feature: Tensor, image_size: Size) -> Tensor:
        return feature.permute(0, 3, 1, 2)

    def to_sequence(self, feature: Tensor) -> Tensor:
        return feature.flatten(1, 2)


@dataclass(frozen=True)
class Tokens(FeatureLayout):
    """``[B, P + H*W, C]``: P prefix tokens, then the positions row by row."""

    axes = "[B, L, C]"
    channel_axis = 2

    def to_maps(self, feature: Tensor, image_size: Size) -> Tensor:
        if self.grid is None:
            raise NoSpatialFeatureError(
                f"this feature, {self.describe()}, holds class tokens only. Name a module in front of the last attention."
            )
        height, width = token_grid(feature.shape[1] - self.num_prefix_tokens, image_size)
        tokens = feature[:, self.num_prefix_tokens :]
        return tokens.transpose(1, 2).reshape(len(feature), feature.shape[2], height, width)

    def to_sequence(self, feature: Tensor) -> Tensor:
        return feature


@dataclass(frozen=True)
class ChannelsFirstTokens(FeatureLayout):
    """``[B, C, H*W]``, the positions row by row."""

    axes = "[B, C, L]"

    def to_maps(self, feature: Tensor, image_size: Size) -> Tensor:
        return feature.reshape(*feature.shape[:2], *token_grid(feature.shape[2], image_size))


@dataclass(frozen=True)
class HiddenStates(ChannelsFirstTokens):
    """``[B, C, N]``: N states of a state-space model, which are no positions. As a map they are their mean."""

    axes = "[B, C, N]"

    def to_maps(self, feature: Tensor, image_size: Size) -> Tensor:
        return feature.mean(2)[:, :, None, None]

    def gradient_to_maps(self, gradient: Tensor, image_size: Size) -> Tensor:
        return gradient.sum(2)[:, :, None, None]  # exact where all states have the same, as behind their mean


@dataclass(frozen=True)
class Vector(FeatureLayout):
    """``[B, C]``."""

    axes = "[B, C]"

    def to_maps(self, feature: Tensor, image_size: Size) -> Tensor:
        raise NoSpatialFeatureError(
            f"this feature, {self.describe()}, is pooled already. Name a module in front of the pooling."
        )

    def to_sequence(self, feature: Tensor) -> Tensor:
        return feature.unsqueeze(1)


@dataclass(frozen=True)
class Joined(Tokens):
    """Several maps as one: at the finest of their grids, channels side by side; ``[B, P + H*W, C_1 + ... + C_n]``."""

    parts: tuple[FeatureLayout, ...] = ()

    def join(self, features: Any, image_size: Size) -> Tensor:
        if not isinstance(features, (list, tuple)) or len(features) != len(self.parts):
            raise ShapeError(
                f"the backbone returned {type(features).__name__}, expected {len(self.parts)} maps as in the probe."
            )
        maps = [part.to_maps(feature, image_size) for part, feature in zip(self.parts, features)]
        finest = max((tuple(each.shape[2:]) for each in maps), key=math.prod)
        # Nearest neighbours repeat values: where the grids divide each other, averages are those of the single maps.
        maps = [nn.functional.interpolate(each, finest, mode="nearest-exact") for each in maps]
        tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], dim=2)
        if not self.num_prefix_tokens:
            return tokens
        prefix = torch.cat([part.prefix(feature) for part, feature in zip(self.parts, features)], dim=2)
        return torch.cat([prefix, tokens], dim=1)


def token_grid(tokens: int, image_size: Size) -> Size:
    """Return ``(H, W)`` with ``H * W == tokens`` whose ratio is nearest to that of the image.

    Example:
        >>> from saliency_reg.integrations.timm.backbone.feature_layout import token_grid
        >>> token_grid(12, (96, 128))
        (3, 4)
    """
    if tokens < 1:
        raise NoSpatialFeatureError("this feature has no tokens for positions. Name a module that returns all tokens.")
    wanted = math.log(image_size[0] / image_size[1])
    heights = [height for height in range(1, tokens + 1) if tokens % height == 0]
    height = min(heights, key=lambda height: abs(math.log(height * height / tokens) - wanted))
    return height, tokens // height


def find_layout(features: Any, model: nn.Module, image_size: Size) -> FeatureLayout:
    """Return the layout of what ``forward_features`` of a timm model returned for one image: a tensor or a list of them."""
    num_features = int(getattr(model, "num_features", 0) or 0)
    if isinstance(features, (list, tuple)) and features and all(isinstance(each, Tensor) for each in features):
        if len(features) == 1:
            raise NoSpatialFeatureError("forward_features returned a list of one tensor, expected the tensor itself.")
        return _joined_layout(features, model, num_features, image_size)
    if not isinstance(features, Tensor):
        raise NoSpatialFeatureError(
            f"{type(model).__name__}.forward_features returned a {type(features).__name__}, expected a tensor or a list of "
            "them. Choose another model, or name a feature map yourself: SaliencyRegularizer(model, feature='name')."
        )
    return _layout_of(features, model, num_features, image_size)


def _joined_layout(features: Sequence[Tensor], model: nn.Module, num_features: int, image_size: Size) -> FeatureLayout:
    axis = 1
    if all(each.ndim == 3 for each in features):
        on_axis_1, on_axis_2 = (sum(each.shape[own] for each in features) == num_features for own in (1, 2))
        axis = 1 if on_axis_1 and not on_axis_2 else 2
    parts = [_layout_of(each, model, each.shape[axis], image_size) for each in features]
    if derives_from(model, *_WITH_HIDDEN_STATES):
        parts[:-1] = [HiddenStates(part.channels, (1, 1)) for part in parts[:-1]]
    prefixes = {part.num_prefix_tokens for part in parts}
    if len(prefixes) > 1 or not all(part.spatial for part in parts):
        raise NoSpatialFeatureError(
            f"{type(model).__name__}.forward_features returned maps that cannot be joined: "
            f"{'; '.join(part.describe() for part in parts)}. Choose another model."
        )
    grid = max((part.grid for part in parts if part.grid is not None), key=math.prod)
    return Joined(sum(part.channels for part in parts), grid, prefixes.pop(), tuple(parts))


def layout_of(feature: Tensor, model: nn.Module, image_size: Size, channels_last: bool) -> FeatureLayout:
    """Return the layout of a map from somewhere inside of a model, whose number of channels is not known.

    ``channels_last`` says how the model arranges its last map, for a shape that does not tell.
    """
    shape = feature.shape
    if len(shape) == 4:
        first, last = _shaped_as(shape[2:4], image_size), _shaped_as(shape[1:3], image_size)
        if channels_last if first == last else last:
            return ChannelsLast(shape[3], (shape[1], shape[2]))
        return ChannelsFirst(shape[1], (shape[2], shape[3]))
    return _layout_of(feature, model, -1, image_size)


def _shaped_as(grid: Sequence[int], image_size: Size) -> bool:
    return grid[0] * image_size[1] == grid[1] * image_size[0]


def _layout_of(feature: Tensor, model: nn.Module, channels: int, image_size: Size) -> FeatureLayout:
    shape = feature.shape
    if len(shape) == 4:
        last = shape[3] == channels and shape[1] != channels
        if (shape[1] == channels) == (shape[3] == channels):
            last = str(getattr(model, "output_fmt", "NCHW")).upper().endswith("NHWC")
        return ChannelsLast(shape[3], (shape[1], shape[2])) if last else ChannelsFirst(shape[1], (shape[2], shape[3]))
    if len(shape) == 3:
        if shape[1] == channels and shape[2] != channels:
            return ChannelsFirstTokens(shape[1], token_grid(shape[2], image_size))
        prefix = _prefix_tokens(shape[1], model, image_size)
        grid = token_grid(shape[1] - prefix, image_size) if shape[1] > prefix else None
        return Tokens(shape[2], grid, prefix)
    if len(shape) == 2:
        return Vector(shape[1], None)
    raise NoSpatialFeatureError(
        f"{type(model).__name__}.forward_features returned a tensor {list(shape)}, expected [B, C, H, W], [B, H, W, C] or "
        "[B, L, C]. Choose another model."
    )


def _prefix_tokens(tokens: int, model: nn.Module, image_size: Size) -> int:
    """Return how many tokens are no positions; where the model does not tell, the others have a grid shaped as the image."""
    told = getattr(model, "num_prefix_tokens", None)
    if isinstance(told, int):
        return min(told, tokens)
    has_class_token = getattr(model, "global_pool", None) == "token" or any(
        name.rpartition(".")[2].startswith("cls_token") for name, _ in model.named_parameters()
    )
    candidates: list[int] = [*range(1, _MOST_PREFIX_TOKENS), 0] if has_class_token else [*range(_MOST_PREFIX_TOKENS)]
    for prefix in candidates:
        if prefix == tokens or (prefix < tokens and _shaped_as(token_grid(tokens - prefix, image_size), image_size)):
            return prefix
    return 1 if has_class_token else 0
