"""Small multi-head models of every kind that the capture has to handle.

Each has ``feature_map(x)`` and ``from_feature(feature)``, so that the slow reference can go through them by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TASKS = ("first", "second", "third")


class Reverse(torch.autograd.Function):
    """The identity, in the same memory, with a reversed gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Model(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.from_feature(self.feature_map(x))

    def feature_map(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def from_feature(self, feature: Tensor) -> dict[str, Tensor]:
        return {task: head(feature) for task, head in self.heads.items()}


class VectorHeads(Model):
    """A dense backbone and heads of any kind on its vector."""

    def __init__(self, make_head: Any) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.heads = nn.ModuleDict({task: make_head() for task in TASKS})

    def feature_map(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class MapHeads(Model):
    """A convolutional backbone and heads on its map."""

    def __init__(self, make_head: Any) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh())
        self.heads = nn.ModuleDict({task: make_head() for task in TASKS})

    def feature_map(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class TokenHeads(Model):
    """Tokens [B, L, D] and heads that answer for each token."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.heads = nn.ModuleDict(
            {task: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, classes)) for task in TASKS}
        )

    def feature_map(self, x: Tensor) -> Tensor:
        return self.backbone(x)


class PooledClassifier(Model):
    """The commonest of all: a map, global average pooling, one Linear with a column per task."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4, len(TASKS))

    def feature_map(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.feature_map(x)).flatten(1))

    def from_feature(self, feature: Tensor) -> dict[str, Tensor]:
        return dict(zip(TASKS, self.fc(self.pool(feature).flatten(1)).unbind(1)))


class VectorClassifier(Model):
    """One head module with a column per task, fed by the feature map itself."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.classifier = head

    def feature_map(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.feature_map(x))

    def from_feature(self, feature: Tensor) -> dict[str, Tensor]:
        return dict(zip(TASKS, self.classifier(feature).unbind(1)))


class Trunk(Model):
    """A block between the feature map and what the heads read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh())
        self.trunk = nn.Sequential(nn.Conv2d(4, 3, 2), nn.Tanh(), nn.Flatten())
        self.head_first = nn.Linear(3, 1)
        self.head_second = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
        self.head_third = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))

    def feature_map(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def from_feature(self, feature: Tensor) -> dict[str, Tensor]:
        hidden = self.trunk(feature)
        return {task: getattr(self, f"head_{task}")(hidden) for task in TASKS}


class Cascade(Model):
    """Heads that read each other's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.heads = nn.ModuleDict({"first": nn.Linear(6, 1), "second": Gated(), "third": Gated()})

    def feature_map(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def from_feature(self, feature: Tensor) -> dict[str, Tensor]:
        first = self.heads["first"](feature)
        second = self.heads["second"](feature, first)
        return {"first": first, "second": second, "third": self.heads["third"](feature, second)}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, feature: Tensor, other: Tensor) -> Tensor:
        return self.layer(feature) * torch.sigmoid(other)


class InPlace(Model):
    """Heads that begin with an in-place operation, so that later heads read what earlier ones wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 6)
        self.heads = nn.ModuleDict(
            {
                "first": nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)),
                "second": nn.Linear(6, 1),
                "third": nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)),
            }
        )

    def feature_map(self, x: Tensor) -> Tensor:
        # A Linear does not save its output, so autograd allows the change.
        return self.backbone(x)


@dataclass
class Entry:
    """A model, how to attach to it, and data for it."""

    model: nn.Module
    inputs: Tensor
    classes: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    channel_axis: int = 0  # without the batch axis
    positions: tuple[int, ...] = ()  # of a dense output, without batch and classes


def mlp(activation: nn.Module, classes: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), activation, nn.Linear(4, classes))


class PoolingHead(nn.Module):
    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, classes))

    def forward(self, feature: Tensor) -> Tensor:
        return self.layers(feature.mean((2, 3)))


def dense_head(classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 3, 1), nn.GELU(), nn.Conv2d(3, classes, 2))


VECTORS, MAPS = (4, 5), (3, 2, 3, 3)
COLUMNS = {"heads": "classifier", "tasks": TASKS}

ZOO = {
    "linear heads": lambda: Entry(VectorHeads(lambda: nn.Linear(6, 1)), torch.randn(VECTORS)),
    "linear heads, 3 classes": lambda: Entry(VectorHeads(lambda: nn.Linear(6, 3)), torch.randn(VECTORS), 3),
    "relu heads": lambda: Entry(VectorHeads(lambda: mlp(nn.ReLU())), torch.randn(VECTORS)),
    "tanh heads": lambda: Entry(VectorHeads(lambda: mlp(nn.Tanh())), torch.randn(VECTORS)),
    "tanh heads, 3 classes": lambda: Entry(VectorHeads(lambda: mlp(nn.Tanh(), 3)), torch.randn(VECTORS), 3),
    "linear columns": lambda: Entry(VectorClassifier(nn.Linear(6, 3)), torch.randn(VECTORS), options=COLUMNS),
    "mlp columns": lambda: Entry(VectorClassifier(mlp(nn.Tanh(), 3)), torch.randn(VECTORS), options=COLUMNS),
    "pooled columns": lambda: Entry(
        PooledClassifier(), torch.randn(MAPS), options={"heads": "fc", "tasks": TASKS, "feature": "backbone"}
    ),
    "pooling heads": lambda: Entry(MapHeads(PoolingHead), torch.randn(MAPS)),
    "dense heads": lambda: Entry(MapHeads(lambda: dense_head(1)), torch.randn(MAPS), positions=(1, 1)),
    "dense heads, 3 classes": lambda: Entry(MapHeads(lambda: dense_head(3)), torch.randn(MAPS), 3, positions=(1, 1)),
    "token heads": lambda: Entry(TokenHeads(1), torch.randn(3, 4, 3), channel_axis=1, positions=(4,)),
    "token heads, 3 classes": lambda: Entry(TokenHeads(3), torch.randn(3, 4, 3), 3, channel_axis=1, positions=(4,)),
    "trunk": lambda: Entry(
        Trunk(), torch.randn(MAPS), options={"heads": [f"head_{t}" for t in TASKS], "tasks": TASKS, "feature": "stem"}
    ),
    "cascade": lambda: Entry(Cascade(), torch.randn(VECTORS)),
    "in-place heads": lambda: Entry(InPlace(), torch.randn(VECTORS)),
}


def build(name: str, seed: int = 0) -> Entry:
    """A float64 entry of the zoo."""
    torch.manual_seed(seed)
    entry = ZOO[name]()
    entry.model.double()
    entry.inputs = entry.inputs.double()
    return entry
