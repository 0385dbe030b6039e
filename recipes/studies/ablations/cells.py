"""One training of an ablation: data, model and options from plain values."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...data.digits import digit_splits, unused_digits
from ...data.sources import Examples, Splits
from ...data.task_kinds import BINARY
from ...models.small_networks import SharedNetwork
from ...training.metrics import macro, selection_score, task_scores
from ...training.train import Data, train
from ..cell_training import cell_options
from ..groups.fits import Place, train_groups
from ..study import Cell
from .factors import GROUPS
from .methods import CONSTANT, AblationMethod

#: Of positive labels that a constant says, so that its logit is finite.
_LEAST_RATE = 1e-3


@dataclass(frozen=True)
class Kept:
    """What of a training is kept: no curves and no relations."""

    content: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.content)


@dataclass(frozen=True)
class WithUnlabelled:
    """Labelled samples that each bring the same ones without labels along, to the penalty but to no loss.

    Attributes:
        labelled: N samples.
        companions: inputs ``[N, k, ...]``.
    """

    labelled: Examples
    companions: Tensor

    def __len__(self) -> int:
        return len(self.labelled)

    def rows_as_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs ``[b + b * k, ...]`` and labels ``[b + b * k, T]``, NaN behind the first b."""
        inputs, labels = self.labelled.rows_as_batch(indices)
        more = self.companions[torch.as_tensor(indices)].flatten(0, 1)
        return torch.cat([inputs, more]), torch.cat([labels, labels.new_full((len(more), labels.shape[1]), torch.nan)])


def train_ablated(cell: Cell, data: Any, folder: Path) -> Kept:
    """Train one cell. Its data need no place."""
    del data
    if cell.setting.values["data"] == GROUPS:
        fitted = train_groups(cell, Place())
        return _kept(fitted.validation, fitted.macro, fitted.best_epoch, fitted.penalty_share)
    values, method = cell.setting.values, cell.method
    splits = ablated_digits(
        cell.seed, values["train_per_class"], values["validation_per_class"], values["tasks"], values["missing"]
    )
    if method.key == CONSTANT:
        validation, test = (_constant_scores(splits, part) for part in (splits.validation, splits.test))
        return _kept(selection_score(validation, splits.kinds), macro(test) if cell.reported else {}, 0, None)
    source: Examples | WithUnlabelled = splits.train
    if isinstance(method, AblationMethod) and method.unlabelled:
        source = with_unlabelled(splits, method.unlabelled, cell.seed)

    def build() -> nn.Module:
        return SharedNetwork(splits.tasks, values["activation"])

    outcome = train(
        build,
        Data(splits.kinds, source, splits.validation, splits.test if cell.reported else None),
        method,
        cell.value,
        cell_options(cell, evaluation_batch_size=None),
        folder=folder,
        resume="auto",
    )
    shares = outcome.curves.get("penalty_share", [])
    return _kept(outcome.validation, outcome.macro, outcome.best_epoch, shares[-1] if shares else None)


def ablated_digits(seed: int, train_per_class: int, validation_per_class: int, tasks: int, missing: float) -> Splits:
    """Digits with the first so many of the ten tasks, and a part of the training labels removed.

    Args:
        seed: of all draws.
        train_per_class, validation_per_class: images of each of the ten digits, whatever the tasks.
        tasks: how many.
        missing: the part of the positive and of the negative training labels of each task that is removed; at least one of
            each stays.
    """
    splits = digit_splits(seed, train_per_class, validation_per_class)
    generator = torch.Generator().manual_seed(seed)

    def part(examples: Examples, removes: float = 0.0) -> Examples:
        labels = examples.labels[:, :tasks].clone()
        for column in labels.unbind(1) if removes else ():
            for truth in (0, 1):
                rows = torch.nonzero(column == truth).squeeze(1)
                count = min(round(removes * len(rows)), len(rows) - 1)
                column[rows[torch.randperm(len(rows), generator=generator)[:count]]] = torch.nan
        return Examples(examples.inputs, labels, examples.rows)

    kinds = dict.fromkeys(splits.tasks[:tasks], BINARY)
    return Splits(kinds, part(splits.train, missing), part(splits.validation), part(splits.test))


def with_unlabelled(splits: Splits, count: int, seed: int) -> WithUnlabelled:
    """The training images, each with so many others that are in none of the splits.

    Raises:
        ValueError: there are not so many.
    """
    unused = unused_digits(splits)
    wanted = count * len(splits.train)
    if wanted > len(unused):
        raise ValueError(f"{wanted} images without labels were asked for, but {len(unused)} are in none of the splits.")
    chosen = torch.randperm(len(unused), generator=torch.Generator().manual_seed(seed))[:wanted]
    return WithUnlabelled(splits.train, unused[chosen].unflatten(0, (len(splits.train), count)))


def _constant_scores(splits: Splits, examples: Examples) -> dict[str, dict[str, float]]:
    """Of the rates of positive training labels, said of every image."""
    logits = splits.train.labels.nanmean(0).logit(_LEAST_RATE)
    return task_scores(logits.expand_as(examples.labels), examples.labels, splits.kinds)


def _kept(validation: float, figures: Mapping[str, float], best_epoch: int, share: float | None) -> Kept:
    shown = {} if share is None else {"penalty_share": float(f"{share:.3g}")}
    content = {"validation": validation, "macro": dict(figures), "best_epoch": best_epoch, **shown}
    return Kept({**content, "scores": {}})
