"""A small residual network for images of 32x32 pixels, under a name of timm's: it trains in seconds on a CPU."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import OptionError, need

#: Its name in ``timm.create_model``; and that of one with half as many channels, which takes a quarter of the time.
SMALL_BACKBONE, NARROW_BACKBONE = "saliency_reg_resnet8", "saliency_reg_resnet8_narrow"


class SmallResNet(nn.Module):
    """Three residual blocks (He et al. 2016) of 32, 64 and 128 channels behind a convolution of stride 2.

    Images ``[B, 3, 32, 32]`` become feature maps ``[B, 128, 4, 4]``. Has what timm's models have: ``forward_features``,
    ``forward_head``, ``num_features`` and ``reset_classifier``.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        widths: tuple[int, int, int] = (32, 64, 128),
    ) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(widths[0], widths[0], 1),
            ResidualBlock(widths[0], widths[1], 2),
            ResidualBlock(widths[1], widths[2], 2),
        )
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put another linear layer behind the pooling; none with 0 classes, and no pooling with ``""``."""
        self.num_classes = num_classes
        self.global_pool = getattr(self, "global_pool", "avg") if global_pool is None else global_pool
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stem", "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)"}

    def forward_features(self, images: Tensor) -> Tensor:
        """``[B, 128, H / 8, W / 8]``."""
        features: Tensor = self.blocks(self.stem(images))
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            features = features.mean((2, 3))
        features = self.head_drop(features)
        return features if pre_logits else self.fc(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first_norm(self.first(inputs)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.shortcut(inputs))


def register_small_backbone() -> None:
    """Make ``timm.create_model`` know :data:`SMALL_BACKBONE` and :data:`NARROW_BACKBONE`; again is harmless."""
    need("timm")
    registry = need("timm.models._registry")
    if SMALL_BACKBONE in registry._model_entrypoints:
        return
    registry.register_model(saliency_reg_resnet8)
    registry.register_model(saliency_reg_resnet8_narrow)


def saliency_reg_resnet8(pretrained: bool = False, **options: Any) -> SmallResNet:
    """What timm calls."""
    return _small_resnet(SMALL_BACKBONE, pretrained, options)


def saliency_reg_resnet8_narrow(pretrained: bool = False, **options: Any) -> SmallResNet:
    """The same with 16, 32 and 64 channels."""
    return _small_resnet(NARROW_BACKBONE, pretrained, {"widths": (16, 32, 64), **options})


def _small_resnet(name: str, pretrained: bool, options: dict[str, Any]) -> SmallResNet:
    if pretrained:
        raise OptionError(f"{name} has no pretrained weights. Leave --pretrained out, or choose another backbone.")
    for other in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(other, None)
    drop_path = options.pop("drop_path_rate", None)
    if drop_path:
        raise OptionError(f"{name} has no stochastic depth. Use --drop-path-rate 0.")
    model = SmallResNet(**options)
    size = (options.get("in_chans", 3), 32, 32)
    model.pretrained_cfg = model.default_cfg = {  # type: ignore[assignment]
        "architecture": name,
        "input_size": size,
        "fixed_input_size": False,
        "num_classes": 1000,
        "pool_size": (4, 4),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "first_conv": "stem.0",
        "classifier": "fc",
    }
    return model
