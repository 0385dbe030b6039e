"""One cell of the CIFAR study: data, model and training from plain values."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel

from ..data.images.cifar import cifar_splits, fingerprint
from ..data.task_kinds import BINARY
from ..models.small_resnet import register_small_backbone
from ..training.train import Data, Outcome, train_tasks
from .cell_training import CellTraining, options_of
from .study import Cell

__all__ = ["CifarCell", "build_model"]


class CifarCell(CellTraining):
    """Trains cells on CIFAR-10."""

    def fingerprint(self, cell: Cell) -> str:
        return fingerprint(self.data, cell.setting.values["image_size"])

    def train(self, cell: Cell) -> Outcome:
        values = cell.setting.values
        splits = cifar_splits(
            self.data,
            seed=cell.seed,
            train_images=values["train_images"],
            validation_images=values["validation_images"],
            image_size=values["image_size"],
            tasks=values["tasks"],
            labelled=values["labelled"],
            augmented=values.get("augmented", True),
        )
        test = splits.test if cell.reported else None
        return train_tasks(
            lambda: build_model(values, splits.tasks),
            Data(dict.fromkeys(splits.tasks, BINARY), splits.train, splits.validation, test),
            cell.method,
            cell.value,
            options_of(cell, channels_last=True),
            cell.seed,
        )


def build_model(values: Mapping[str, Any], tasks: tuple[str, ...]) -> nn.Module:
    """The backbone with a head for each task."""
    register_small_backbone()
    head = HeadConfig(1, hidden=(values["head_width"],), activation=values["activation"])
    model: nn.Module = TimmMultiTaskModel(
        values["backbone"], dict.fromkeys(tasks, head), image_size=values["image_size"]
    )
    return model
