"""One training on SARCOS or School: data, model and options from plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.tabular import sarcos_splits, school_splits
from ..models.small_networks import SharedMLP
from ..training.outcome import Outcome
from ..training.train import Data, train
from .cell_training import cell_options
from .study import Cell


def train_tabular(cell: Cell, data: Any, folder: Path) -> Outcome:
    """Train one cell on a folder that has the folders ``sarcos`` and ``school``."""
    values = cell.setting.values
    own = str(Path(data, values["data"]))
    if values["data"] == "school":
        splits = school_splits(own, seed=cell.seed, validation_share=values["validation_share"])
    else:
        rows = {name: values[name] for name in ("rows_per_task", "validation_rows")}
        splits = sarcos_splits(own, seed=cell.seed, **rows)
    inputs = splits.train.inputs.shape[1]
    return train(
        lambda: SharedMLP(inputs, tuple(splits.kinds), values["width"], values["head_width"], values["activation"]),
        Data(splits.kinds, splits.train, splits.validation, splits.test if cell.reported else None),
        cell.method,
        cell.value,
        cell_options(cell),
        folder=folder,
        resume="auto",
    )
