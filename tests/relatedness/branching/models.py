"""Small backbones with random weights, and models that branch on them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from saliency_reg import BranchingModel

TASKS = ("first", "second", "third", "fourth")


def plain() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 6)]
    return nn.Sequential(*layers), torch.randn(4, 5)


def nested() -> tuple[nn.Module, Tensor]:
    def stage(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))

    stages = {
        "stem": stage(3),
        "middle": stage(4),
        "top": stage(4),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
    }
    backbone = nn.Sequential()
    for name, module in stages.items():
        backbone.add_module(name, module)
    return backbone, torch.randn(2, 3, 16, 16)


def torchvision_resnet() -> tuple[nn.Module, Tensor]:
    models = pytest.importorskip("torchvision.models")
    backbone = models.resnet18()
    backbone.fc = nn.Identity()
    return backbone, torch.randn(2, 3, 32, 32)


def from_timm(name: str, size: int = 32, **options: object) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=0, **options), torch.randn(2, 3, size, size)

    return build


BACKBONES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "plain": plain,
    "nested": nested,
    "torchvision resnet18": torchvision_resnet,
    "timm resnet18": from_timm("resnet18"),
    "timm convnext": from_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16)),
    "timm vit": from_timm("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3),
    "timm mobilenet": from_timm("mobilenetv3_small_050"),
}
STAGES = {
    "plain": ["0", "2", "5"],
    "nested": ["stem", "middle", "top"],
    "torchvision resnet18": ["conv1", "layer1", "layer2", "layer3", "layer4"],
    "timm resnet18": ["conv1", "layer1", "layer2", "layer3", "layer4"],
    "timm convnext": ["stem", "stages.0", "stages.1", "stages.2", "stages.3"],
    "timm vit": ["patch_embed", "blocks.0", "blocks.1", "blocks.2"],
    "timm mobilenet": ["conv_stem", *(f"blocks.{number}" for number in range(6)), "conv_head"],
}


def branching(name: str = "plain", seed: int = 0, tasks: tuple[str, ...] = TASKS) -> tuple[BranchingModel, Tensor]:
    """Return a model of T tasks, and an input of it."""
    torch.manual_seed(seed)
    backbone, x = BACKBONES[name]()
    backbone.to(x.dtype).eval()
    with torch.no_grad():
        width = backbone(x).shape[1]
    backbone.train()
    return BranchingModel(backbone, {task: nn.Linear(width, 1) for task in tasks}, x), x
