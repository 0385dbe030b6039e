"""One cell of the CIFAR study: data, model and training from plain values."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from saliency_reg.integrations.timm import HeadConfig, TimmMultiTaskModel

from ..multi_task.cells import timed
from ..multi_task.kinds import BINARY
from ..multi_task.study import Cell
from ..multi_task.training import Data, Options, train_tasks
from .cifar import cifar_splits, fingerprint
from .small_backbone import register_small_backbone

__all__ = ["CifarCell", "build_model"]


@dataclass(frozen=True)
class CifarCell:
    """Trains cells in any process.

    Attributes:
        data: folder or hub id of CIFAR-10.
        deadline: of ``time.time()``, after which no training begins.
    """

    data: str
    deadline: float | None = None

    def __call__(self, cell: Cell) -> tuple[Cell, dict[str, Any] | None, dict[str, Any]]:
        """The cell, its result (``None`` after the deadline), and what else should be known about it."""
        if self.deadline is not None and time.time() > self.deadline:
            return cell, None, {}
        values = cell.setting.values
        with timed(fingerprint(self.data, values["image_size"])) as about:
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
            outcome = train_tasks(
                lambda: build_model(values, splits.tasks),
                Data(
                    dict.fromkeys(splits.tasks, BINARY),
                    splits.train,
                    splits.validation,
                    splits.test if cell.reported else None,
                ),
                cell.method,
                cell.value,
                Options(
                    epochs=values["epochs"],
                    batch_size=values["batch_size"],
                    learning_rate=values["learning_rate"],
                    weight_decay=values["weight_decay"],
                    evaluations=values["evaluations"],
                    temperature=values["temperature"],
                    channels_last=True,
                ),
                cell.seed,
            )
        return cell, outcome.to_dict(), about


def build_model(values: Mapping[str, Any], tasks: tuple[str, ...]) -> nn.Module:
    """The backbone with a head for each task."""
    register_small_backbone()
    head = HeadConfig(1, hidden=(values["head_width"],), activation=values["activation"])
    model: nn.Module = TimmMultiTaskModel(
        values["backbone"], dict.fromkeys(tasks, head), image_size=values["image_size"]
    )
    return model
