"""One training of the CIFAR study: data, model and options from plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel

from ..data.images.cifar import cifar_splits
from ..data.task_kinds import BINARY
from ..models.small_resnet import register_small_backbone
from ..training.outcome import Outcome
from ..training.train import Data, train
from .cell_training import cell_options
from .study import Cell


def train_cifar(cell: Cell, data: Any, folder: Path) -> Outcome:
    """Train one cell on CIFAR-10."""
    values = cell.setting.values
    splits = cifar_splits(
        data,
        seed=cell.seed,
        train_images=values["train_images"],
        validation_images=values["validation_images"],
        image_size=values["image_size"],
        tasks=values["tasks"],
        labelled=values["labelled"],
        augmented=values.get("augmented", True),
    )

    def build() -> nn.Module:
        register_small_backbone()
        head = HeadConfig(1, hidden=(values["head_width"],), activation=values["activation"])
        heads = dict.fromkeys(splits.tasks, head)
        return TimmMultiTaskModel(values["backbone"], heads, image_size=values["image_size"])

    test = splits.test if cell.reported else None
    own = Data(dict.fromkeys(splits.tasks, BINARY), splits.train, splits.validation, test)
    options = cell_options(cell, channels_last=True)
    return train(build, own, cell.method, cell.value, options, folder=folder, resume="auto")
