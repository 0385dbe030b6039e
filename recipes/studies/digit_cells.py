"""One training on handwritten digits: data, model and options from plain values; and what is said and checked before."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.digits import TEST_IMAGES, digit_splits, most_per_class
from ..data.task_kinds import BINARY
from ..models.small_networks import SeparateNetworks, SharedNetwork
from ..runs.command_line import check_options
from ..training.outcome import Outcome
from ..training.train import Data, train
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

    tracked = ("digits", {"method": method.key, cell.setting.parameter(method): cell.value, "seed": cell.seed})
    own = Data(
        dict.fromkeys(splits.tasks, BINARY), splits.train, splits.validation, splits.test if cell.reported else None
    )
    options = cell_options(cell, evaluation_batch_size=None, watch_conflicts=True, **data)
    tracking = tracked if options.trackers else None
    return train(build, own, method, cell.value, options, folder=folder, resume="auto", tracked=tracking)


def introduction(options: argparse.Namespace) -> str:
    """What is the same for all methods, and what they are."""
    lines = [
        f"Digits: ten one-vs-rest tasks (10 % positive) with {options.train_per_class} training and "
        f"{options.validation_per_class} validation images per class,",
        f"drawn anew for each seed; the same {TEST_IMAGES} test images for all. With more training images all methods "
        "approach the ceiling.",
        f"All methods: AdamW, learning rate {options.learning_rate:g}, batch {options.batch_size}, {options.epochs} "
        f"epochs, the best one by validation AUC, {options.activation} heads.",
        f"Values tried for the hyper-parameter of each method: {options.trials or len(options.strengths)}, chosen by "
        f"validation AUC on seeds ({options.tuning_seeds}) that are not among the {options.seeds} reported.",
        "Single-task is ten separate networks, ten times the parameters, with a best epoch each. SRDML has no weight "
        "decay.",
        "PCGrad (feature) and MGDA-UB weigh the task gradients at the feature map that the heads share, in the one backward",
        "pass. PCGrad (parameters) is the method of Yu et al. 2020 on all parameters of the backbone, with a backward pass",
        "for each task. Heads keep their plain gradients. MGDA-UB has the weights of the shortest convex combination of the",
        "gradients (Sener and Koltun 2018), or of the gradients at unit length (an option of their code). SRDML has the",
        "entropic rule if no other is named; with PCGrad, the gradient of the penalty is added, never projected.",
    ]
    if options.activation == "relu":
        lines.append("With ReLU heads the penalty does not reach the backbone: it trains the heads only.")
    if options.accumulation > 1:
        lines.append("Surgery at the feature map weighs each micro-batch on its own.")
    return "\n".join(lines)


def check_digits(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot go together."""
    check_options(parser, options)
    most, validation = most_per_class(), options.validation_per_class
    if validation >= most:
        parser.error(
            f"argument --validation-per-class: there are only {most} images of each digit outside the test set. Use "
            "--validation-per-class 20."
        )
    if options.train_per_class + validation > most:
        parser.error(
            f"--train-per-class and --validation-per-class ask for {options.train_per_class + validation} images of each "
            f"digit, but there are only {most} outside the test set. Use --train-per-class {most - validation} or less."
        )
    for name in ("weight_decays", "strengths"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            parser.error(f"argument --{name.replace('_', '-')}: the same value twice. Use each value once.")
    if options.trials is not None and len(options.strengths) == 1:
        parser.error(
            "argument --trials: there is nothing to search with a single value. Use several --strengths, or leave it out."
        )
    if len(options.strengths) != len(options.weight_decays):
        parser.error(
            f"every method gets the same number of trials, but there are {len(options.weight_decays)} --weight-decays "
            f"and {len(options.strengths)} --strengths. Use as many of the one as of the other."
        )
