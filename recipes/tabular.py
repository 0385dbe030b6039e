"""Tables on SARCOS (7 tasks) and School (139 tasks): regression where every training row has the label of one task.

All heads see every row, since the saliency needs no label. Every result goes into one file as soon as it is there, and is
never computed again: stop the command whenever you like, and run it again to go on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .data.sources import Splits
from .data.tabular import fingerprint, sarcos_splits, school_splits
from .methods.methods import FULL_LABELS, MISSING_LABELS
from .models.small_networks import ACTIVATIONS
from .studies.cell_training import CellTraining, options_of
from .studies.command import GridCommand
from .studies.study import Cell, Setting
from .training.train import Data, Outcome, train_tasks

__all__ = ["COMMAND", "SETTINGS", "TabularCell", "main"]

#: Raise it when the trainings behind the same values change: old results are then no longer found.
VERSION = 1
_GRIDS: dict[str, tuple[float, ...]] = {
    "weight decay": (0.0, 0.05, 0.5),
    "strength, l1": (0.01, 0.03, 0.1),
    "strength, cosine": (0.01, 0.03, 0.1),
    "strength, sqchordal": (0.01, 0.03, 0.1),
}


def _setting(key: str, label: str, methods: tuple[str, ...], **own: Any) -> Setting:
    values = {
        "version": VERSION,
        "activation": "gelu",
        "width": 64,
        "head_width": 16,
        "learning_rate": 3e-3,
        "weight_decay": 0.05,
        "evaluations": 20,
        **own,
    }
    return Setting(key, label, values, methods, _GRIDS)


def _sarcos(rows: int) -> Setting:
    return _setting(
        f"sarcos-{rows}",
        f"SARCOS, {rows} rows for each of 7 torques",
        MISSING_LABELS,
        data="sarcos",
        rows_per_task=rows,
        validation_rows=500,
        epochs=100,
        batch_size=35 if rows < 100 else 70,
    )


#: In the order in which they are trained.
SETTINGS = {
    setting.key: setting
    for setting in (
        _sarcos(30),
        _sarcos(100),
        _setting(
            "school",
            "School, 139 tasks",
            FULL_LABELS,
            data="school",
            validation_share=0.2,
            epochs=8,
            batch_size=500,
        ),
    )
}


class TabularCell(CellTraining):
    """Trains cells on a folder that has the folders ``sarcos`` and ``school``."""

    def fingerprint(self, cell: Cell) -> str:
        del cell  # both data sets count
        return fingerprint(self.data)

    def train(self, cell: Cell) -> Outcome:
        values = cell.setting.values
        splits = _splits(self.data, values, cell.seed)
        return train_tasks(
            lambda: SharedMLP(splits, values),
            Data(splits.kinds, splits.train, splits.validation, splits.test if cell.reported else None),
            cell.method,
            cell.value,
            options_of(cell),
            cell.seed,
        )


class SharedMLP(nn.Module):
    """Two hidden layers that all tasks share, and a head with one hidden layer for each."""

    def __init__(self, splits: Splits, values: Mapping[str, Any]) -> None:
        super().__init__()
        activation, width = ACTIVATIONS[values["activation"]], values["width"]
        inputs = splits.train.inputs.shape[1]
        self.backbone = nn.Sequential(nn.Linear(inputs, width), activation(), nn.Linear(width, width), activation())
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(
                    nn.Linear(width, values["head_width"]),
                    activation(),
                    nn.Linear(values["head_width"], 1),
                    nn.Flatten(0),
                )
                for task in splits.kinds
            }
        )

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """``{task: [B]}``."""
        feature = self.backbone(inputs)
        return {task: head(feature) for task, head in self.heads.items()}


def _splits(folder: str, values: Mapping[str, Any], seed: int) -> Splits:
    own = str(Path(folder, values["data"]))
    if values["data"] == "school":
        return school_splits(own, seed=seed, validation_share=values["validation_share"])
    return sarcos_splits(
        own, seed=seed, rows_per_task=values["rows_per_task"], validation_rows=values["validation_rows"]
    )


COMMAND = GridCommand(
    name="tabular",
    description=__doc__,
    settings=SETTINGS,
    metrics=("nmse",),
    compared=("nmse",),
    data=(None, "folder that has the folders sarcos and school, with train.parquet and test.parquet each"),
    packages=("datasets",),
    fingerprint=fingerprint,
    trainer=TabularCell,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing, print the tables, and return the exit code."""
    return COMMAND.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
