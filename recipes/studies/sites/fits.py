"""One training of kinds of tasks at many sites: data, network and penalty from plain values."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer

from ...data.digits import digit_splits
from ...data.sites import SiteSplits, school_sites, split_by_sites
from ...data.tabular import sarcos_splits
from ...methods.attach import by_share
from ...training.learning_rate import learning_rate_factor
from ...training.metrics import area_under_curve, macro, selection_score, task_scores
from ...training.optimizers import adamw_on_heads
from ..cell_training import cell_options
from ..groups.networks import ColumnPerGroup, GroupNetwork, PooledWithIntercepts
from ..study import Cell
from .methods import SiteMethod


class ColumnPerKind(ColumnPerGroup):
    """One hidden layer that all tasks share, and a column for each kind of task."""

    def __init__(self, inputs: int, kind_of: Tensor, width: int) -> None:
        super().__init__(inputs, int(kind_of.max()) + 1, width)
        self.kind_of = kind_of

    def for_all_groups(self, inputs: Tensor) -> Tensor:
        return super().for_all_groups(inputs)[:, self.kind_of]


@dataclass
class FittedSites:
    """What a training left, as plain numbers.

    Attributes:
        validation: mean AUC of the tasks, or one minus their mean nMSE.
        macro: on the test rows; of a trial it is empty. ``pairs``: how well relations tell pairs of one kind from others, as
            AUC; ``kept``: the part of all weight that is on pairs of one kind.
        best_epoch: by validation.
        scores: none of single tasks.
    """

    validation: float
    macro: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def splits_of(cell: Cell, data: str | None) -> SiteSplits:
    """The rows of a cell.

    Raises:
        DataError, OptionError: there are none, or too few.
    """
    values = cell.setting.values
    sites, rows, validation = values["sites"], values["rows"], values["validation_rows"]
    if values["data"] == "schools":
        return school_sites(sites=sites, rows=rows, validation_rows=validation, seed=cell.seed)
    if values["data"] == "digits":
        splits = digit_splits(cell.seed, values["train_per_class"], validation // 10)
    else:
        splits = sarcos_splits(
            str(Path(data or "", "sarcos")), seed=cell.seed, rows_per_task=sites * rows, validation_rows=validation
        )
    return split_by_sites(splits, sites=sites, rows=rows, seed=cell.seed)


def train_sites(cell: Cell, data: str | None, folder: Path | None = None) -> FittedSites:
    """Train one cell; it leaves no checkpoint. Each step has as many rows of each task."""
    del folder
    values, options, splits = cell.setting.values, cell_options(cell), splits_of(cell, data)
    model = network_for(cell, splits)
    decay = cell.value if cell.method.rule is None else options.weight_decay
    optimizer = adamw_on_heads(model, options.learning_rate, decay)
    count, per_step = splits.targets.shape[1], values["rows_per_step"]
    starts = range(0, count - per_step + 1, per_step)
    steps = len(starts) * options.epochs
    penalty = penalty_for(cell, model, optimizer, splits, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(options.decay, 0, steps))
    binary = next(iter(splits.tasks.values())).name == "binary"
    criterion: Any = nn.functional.binary_cross_entropy_with_logits if binary else nn.functional.mse_loss
    generator = torch.Generator().manual_seed(cell.seed)
    best, state, relations = FittedSites(-math.inf), copy.deepcopy(model.state_dict()), None
    for epoch in range(1, options.epochs + 1):
        order = torch.rand(splits.targets.shape, generator=generator).argsort(dim=1)
        for start in starts:
            chosen = order[:, start : start + per_step]
            outputs = model(splits.inputs.take_along_dim(chosen.unsqueeze(2), dim=1))
            loss = criterion(outputs, splits.targets.gather(1, chosen), reduction="none").mean(1).sum()
            optimizer.zero_grad()
            total = loss if penalty is None else loss + penalty(losses=loss.detach())
            total.backward()
            optimizer.step()
            scheduler.step()
        if epoch % values["epochs_per_evaluation"] and epoch != options.epochs:
            continue
        score = selection_score(_scores(model, splits, "validation"), splits.tasks)
        if score > best.validation:
            best, state = FittedSites(score, best_epoch=epoch), copy.deepcopy(model.state_dict())
            relations = None if penalty is None else penalty.relations.matrix()
    model.load_state_dict(state)
    if penalty is not None:
        penalty.remove()
    if cell.reported:
        best.macro = macro(_scores(model, splits, "test"))
        if relations is not None:
            best.macro.update(agreement(relations, splits.same_kind))
    return best


def network_for(cell: Cell, splits: SiteSplits) -> GroupNetwork:
    """A network whose weights the seed of the cell draws."""
    heads = cell.method.heads if isinstance(cell.method, SiteMethod) else "tasks"
    inputs, tasks, width = splits.inputs.shape[2], len(splits.tasks), cell.setting.values["width"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        if heads == "kinds":
            return ColumnPerKind(inputs, splits.kind_of, width)
        return (PooledWithIntercepts if heads == "one" else ColumnPerGroup)(inputs, tasks, width)


def penalty_for(
    cell: Cell, model: nn.Module, optimizer: torch.optim.Optimizer, splits: SiteSplits, steps: int
) -> SaliencyRegularizer | None:
    """The regularizer of a method that has one, for so many steps."""
    method, values = cell.method, cell.setting.values
    if method.rule is None:
        return None
    own: dict[str, Any] = {}
    if method.rule in ("entropic", "per_task"):
        own["temperature"] = values["temperature"]
    if isinstance(method, SiteMethod) and method.knows_kinds:
        own["matrix"] = splits.same_kind
    return by_share(
        SaliencyRegularizer,
        model,
        cell.value,
        heads="heads",
        tasks=tuple(splits.tasks),
        optimizer=optimizer,
        metric=method.metric,
        relations=RelationWeights(len(splits.tasks), method.rule, **own),
        start_step=round(values["late"] * steps) if isinstance(method, SiteMethod) and method.late else 0,
    )


def agreement(relations: Tensor, same_kind: Tensor) -> dict[str, float]:
    """How well relations find the pairs of one kind, and the part of their weight that is on these."""
    row, column = torch.triu_indices(len(relations), len(relations), 1)
    weights, same = relations[row, column], same_kind[row, column]
    return {"pairs": area_under_curve(weights, same), "kept": float((weights * same).sum() / weights.sum())}


@torch.no_grad()
def _scores(model: GroupNetwork, splits: SiteSplits, part: str) -> dict[str, dict[str, float]]:
    examples = getattr(splits, part)
    return task_scores(model.for_all_groups(examples.inputs), examples.labels, splits.tasks)
