"""One training on molecules: data, model and options from plain values; and what is said before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.molecules import MoleculeTable, molecule_splits, read_molecules
from ..data.sources import Splits
from ..methods.methods import METHODS, Method, Methods
from ..models.linear_heads import LinearHeads, PooledHead, SeparateLinearHeads
from ..training.metrics import macro, mean_of_known, selection_score, task_scores
from ..training.optimizers import adamw_on_heads
from ..training.train import Data, train
from .cell_training import cell_options
from .study import Cell, Setting

#: The same guess for every molecule, of which nothing is trained, and one guess for all assays.
CONSTANT, POOLED = Method("constant", "Constant"), Method("pooled", "One pooled head")
MOLECULE_METHODS = Methods()
for _method in (CONSTANT, POOLED, *METHODS.values()):
    MOLECULE_METHODS.add(_method)
#: However few training molecules there are.
_LEAST_BATCH = 10
#: Digits of relations that are kept.
_DIGITS = 3


@dataclass(frozen=True)
class Kept:
    """What of a training is kept: no curves, and of 27 tasks no more than their AUC."""

    content: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.content)


def train_molecules(cell: Cell, data: Mapping[str, MoleculeTable], folder: Path) -> Kept:
    """Train one cell on one of these tables."""
    splits, values, method = _splits(cell.setting, data, cell.seed), cell.setting.values, cell.method
    if method.key == CONSTANT.key:
        return _constant(splits)
    network = PooledHead if method.key == POOLED.key else LinearHeads if method.shared else SeparateLinearHeads

    def build() -> nn.Module:
        return network(splits.train.inputs.shape[1], splits.tasks, values["widths"], values["activation"])

    outcome = train(
        build,
        Data(splits.kinds, splits.train, splits.validation, splits.test if cell.reported else None),
        method,
        cell.value,
        cell_options(cell, evaluations=values["epochs"], batch_size=_batch_size(splits, values["steps_of_epoch"])),
        folder=folder,
        resume="auto",
        make_optimizer=adamw_on_heads,
    )
    keeps = outcome.relations is not None and cell.reported and method.rule != "fixed"
    relations = [[round(own, _DIGITS) for own in row] for row in outcome.relations or ()] if keeps else None
    return _kept(outcome.validation, outcome.best_epoch, outcome.scores, splits, relations)


def told(settings: Sequence[Setting], data: Mapping[str, MoleculeTable]) -> str:
    """What the tables have, and what of it is used; also checks that there are labels enough for these settings.

    Raises:
        RecipeError: files, columns or numbers of labels that cannot be used.
    """
    values = settings[0].values
    layers = "-".join(map(str, values["widths"]))
    lines = [
        f"All methods: counts of substructures ({values['bits']} bits), an MLP {layers} with a linear head for each task, "
        f"AdamW, learning rate {values['learning_rate']:g}, {values['epochs']} epochs of {values['steps_of_epoch']} steps, "
        "the best one by validation AUC.",
        "SRDML has the head weight decay that hard sharing has chosen, and tunes the share of the penalty in the losses.",
    ]
    for setting in settings:
        splits = _splits(setting, data, 0)
        sizes = [len(own) for own in (splits.train, splits.validation, splits.test)]
        labels = splits.train.labels
        share = 100 * float(labels.nanmean())
        known = int((~torch.isnan(labels)).sum())
        lines.append(
            f"{setting.label}: {len(splits.kinds)} tasks; {sizes[0]} training molecules with {known} labels, {share:.0f} % "
            f"of them 1; {sizes[1]} validation and {sizes[2]} test molecules, with all of their labels."
        )
    for name in dict.fromkeys(setting.values["data"] for setting in settings):
        molecules = read_molecules(data[name], values["bits"])
        if molecules.unreadable:
            shown = ", ".join(f"row {row} ({text!r})" for row, text in list(molecules.unreadable.items())[:5])
            more = len(molecules.unreadable) - 5
            lines.append(f"Left out, since rdkit cannot read them: {shown}{f' and {more} more' if more > 0 else ''}.")
        if molecules.left_out:
            lines.append(f"Columns that are no tasks: {'; '.join(molecules.left_out.values())}.")
    return "\n".join(lines)


def _splits(setting: Setting, data: Mapping[str, MoleculeTable], seed: int) -> Splits:
    values = setting.values
    names = ("labels", "labelled", "validation_share", "test_share")
    molecules = read_molecules(data[values["data"]], values["bits"])
    return molecule_splits(molecules, seed=seed, **{name: values[name] for name in names})


def _batch_size(splits: Splits, steps: int) -> int:
    return max(_LEAST_BATCH, len(splits.train) // steps)


def _constant(splits: Splits) -> Kept:
    def scores(labels: Tensor) -> dict[str, dict[str, float]]:
        return task_scores(torch.zeros_like(labels), labels, splits.kinds)

    validation = selection_score(scores(splits.validation.labels), splits.kinds)
    return _kept(validation, 0, scores(splits.test.labels), splits, None)


def _kept(
    validation: float,
    best_epoch: int,
    scores: Mapping[str, Mapping[str, float]],
    splits: Splits,
    relations: list[list[float]] | None,
) -> Kept:
    labels = splits.train.labels
    both = ((labels == 1).any(0) & (labels == 0).any(0)).tolist()
    own = {task: {"auc": measured["auc"]} for task, measured in scores.items()}
    learnable = mean_of_known([measured["auc"] for measured, kept in zip(own.values(), both) if kept])
    figures = {**macro(own), "auc_learnable": learnable} if own else {}
    return Kept(
        {
            "best_epoch": best_epoch,
            "validation": validation,
            "macro": figures,
            "scores": own,
            "relations": relations,
        }
    )
