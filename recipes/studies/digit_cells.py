"""One training on handwritten digits: data, model and options from plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.digits import digit_splits
from ..data.task_kinds import BINARY
from ..models.small_networks import SeparateNetworks, SharedNetwork
from ..training.train import Data, Outcome, train
from .cell_training import cell_options
from .study import Cell

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def train_digits(cell: Cell, data: Any, folder: Path) -> Outcome:
    """Train one cell. The data are options that change no number: checkpoint steps, data workers and trackers."""
    values = cell.setting.values
    dtype = DTYPES[values["dtype"]]
    splits = digit_splits(cell.seed, values["train_per_class"], values["validation_per_class"], dtype)
    method: Any = cell.method

    def build() -> nn.Module:
        network = SharedNetwork if method.shared else SeparateNetworks
        return network(splits.tasks, values["activation"]).to(dtype)

    tracked = ("digits", {"method": method.key, method.parameter: cell.value, "seed": cell.seed})
    own = Data(
        dict.fromkeys(splits.tasks, BINARY), splits.train, splits.validation, splits.test if cell.reported else None
    )
    options = cell_options(cell, evaluation_batch_size=None, watch_conflicts=True, **data)
    tracking = tracked if options.trackers else None
    return train(build, own, method, cell.value, options, folder=folder, resume="auto", tracked=tracking)
