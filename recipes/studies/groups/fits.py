"""One learning of all groups: a network by AdamW with the best epoch by validation, a mixed model, or means."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from saliency_reg import RelationWeights, SaliencyRegularizer

from ...data.groups import GroupRows, GroupSplits, GroupTable, read_known, read_own, split_groups
from ...methods.attach import by_share
from ...methods.methods import Method
from ...training.learning_rate import learning_rate_factor
from ...training.optimizers import adamw_on_heads
from ..cell_training import cell_options
from ..study import Cell
from .methods import CONSTANT, MIXED_MODEL, MIXED_MODEL_MORE, POOLED
from .mixed_model import GroupLines, fit_mixed_model
from .networks import ColumnPerGroup, GroupNetwork, NetworkPerGroup, PooledWithIntercepts

#: Of it effects and relations of the groups are kept, for pictures.
PICTURED_SEED = 0
#: Relations of more methods would make a long file.
_KEEPS_RELATIONS = ("srdml", "srdml_default")


class Place(NamedTuple):
    """Where the rows are: the folder that has the folder ``school``, or a CSV file of one's own and its columns."""

    folder: str | None = None
    table: str | None = None
    group: str = ""
    target: str = ""
    inputs: tuple[str, ...] = ()

    def read(self, name: str) -> GroupTable:
        """The rows.

        Raises:
            DataError: they cannot be read.
        """
        if self.table is not None:
            return read_own(self.table, self.group, self.target, self.inputs)
        return read_known(name, self.folder)


class Predictor(Protocol):
    """What was learned."""

    def for_all_groups(self, inputs: Tensor) -> Tensor:
        """Predictions ``[M, T]`` of rows ``[M, D]``, for each of the groups."""


@dataclass
class FittedGroups:
    """What a training left, as plain numbers.

    Attributes:
        validation: one minus the mean squared error over the variance.
        macro: the same ratio on the test rows, as ``"nmse"``; of a trial it is empty.
        best_epoch: 0 without epochs.
        penalty_share: of the penalty in the losses of the last step, if there is one.
        note: what kind of model was fitted, where there are several.
        tasks, effects, relations: of the pictured seed: names of the groups; the mean prediction of each and its slope
            along the common line; ``[T, T]``.
        scores: none of single groups, which have few test rows.
    """

    validation: float
    macro: dict[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    penalty_share: float | None = None
    note: str = ""
    tasks: list[str] = field(default_factory=list)
    effects: dict[str, list[float]] = field(default_factory=dict)
    relations: list[list[float]] | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Without what is not there."""
        return {name: value for name, value in vars(self).items() if value or name in ("validation", "macro", "scores")}


def train_groups(cell: Cell, data: Place, folder: Path | None = None) -> FittedGroups:
    """Train one cell; it leaves no checkpoint."""
    del folder
    values = cell.setting.values
    rows, validation_rows, groups = values["rows"], values["validation_rows"], values.get("groups")
    splits = split_groups(
        data.read(values["data"]), rows=rows, validation_rows=validation_rows, seed=cell.seed, groups=groups
    )
    learned, fitted = _learn(cell, splits)
    if not cell.reported or cell.seed != PICTURED_SEED or cell.method.key not in _KEEPS_RELATIONS:
        fitted.relations = None
    if not cell.reported:
        return fitted
    with torch.no_grad():
        predicted = learned.for_all_groups(splits.test_inputs).gather(1, splits.test_groups.unsqueeze(1)).squeeze(1)
        fitted.macro = {"nmse": _error(predicted, splits.test_targets, splits)}
        if cell.seed == PICTURED_SEED:
            fitted.tasks = list(splits.names)
            fitted.effects = effects_of(learned, splits.train)
    return fitted


def effects_of(learned: Predictor, rows: GroupRows) -> dict[str, list[float]]:
    """What the function of each group is like on the rows of all groups.

    ``"mean"`` is its mean. ``"slope"`` is that of its least-squares line on the common line, the one of least squares
    through all rows: 1 for a group in which the inputs matter as much as in all groups together.
    """
    inputs, targets = rows.inputs.flatten(0, 1), rows.targets.flatten()
    design = torch.cat([torch.ones(len(inputs), 1), inputs], dim=1).double()
    common = design @ torch.linalg.lstsq(design, targets.double().unsqueeze(1), driver="gelsd").solution
    predicted = learned.for_all_groups(inputs).double()
    centred = common - common.mean()
    slopes = (centred * (predicted - predicted.mean(0))).sum(0) / centred.square().sum()
    found = {"mean": predicted.mean(0), "slope": slopes}
    return {name: [round(value, 4) for value in effect.tolist()] for name, effect in found.items()}


def _learn(cell: Cell, splits: GroupSplits) -> tuple[Predictor, FittedGroups]:
    key, train, validation = cell.method.key, splits.train, splits.validation
    if key not in (CONSTANT, MIXED_MODEL, MIXED_MODEL_MORE):
        return train_network(cell, splits)
    if key == CONSTANT:
        means = train.targets.mean(1).double()
        lines = GroupLines(torch.zeros(len(means), train.inputs.shape[2]).double(), means, "")
    else:
        rows = train
        if key == MIXED_MODEL_MORE:
            rows = GroupRows(*(torch.cat(pair, dim=1) for pair in zip(vars(train).values(), vars(validation).values())))
        lines = fit_mixed_model(rows, splits.within)
    error = _error(_of_own_groups(lines, validation), validation.targets, splits)
    return lines, FittedGroups(1 - error, note=lines.note)


def train_network(cell: Cell, splits: GroupSplits) -> tuple[GroupNetwork, FittedGroups]:
    """Train a network, and return it with the weights of its best epoch.

    Each step has as many rows of each group, so that all groups take part in all of them.
    """
    method, values, options = cell.method, cell.setting.values, cell_options(cell)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        model = network_for(method)(len(splits.inputs), len(splits.names), values["width"])
    optimizer = adamw_on_heads(
        model, options.learning_rate, cell.value if method.rule is None else options.weight_decay
    )
    penalty = _penalty(cell, model, optimizer, splits.names)
    count = splits.train.targets.shape[1]
    steps = min(count, values["steps_per_epoch"])
    factor = learning_rate_factor(options.decay, 0, steps * options.epochs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(cell.seed)
    best, state, relations = FittedGroups(-math.inf), copy.deepcopy(model.state_dict()), None
    for epoch in range(1, options.epochs + 1):
        order = torch.rand(splits.train.targets.shape, generator=generator).argsort(dim=1)
        for chosen in order.tensor_split(steps, dim=1):
            inputs = splits.train.inputs.take_along_dim(chosen.unsqueeze(2), dim=1)
            loss = (model(inputs) - splits.train.targets.gather(1, chosen)).square().mean(1).sum()
            optimizer.zero_grad()
            total = loss if penalty is None else loss + penalty(losses=loss.detach())
            total.backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            error = _error(model(splits.validation.inputs), splits.validation.targets, splits)
        if 1 - error > best.validation:
            best = FittedGroups(1 - error, best_epoch=epoch)
            state = copy.deepcopy(model.state_dict())
            if penalty is not None and penalty.report is not None:
                best.penalty_share = float(f"{penalty.report.share or 0.0:.3g}")
                relations = penalty.relations.matrix() if method.rule == "entropic" else None
    model.load_state_dict(state)
    if penalty is not None:
        penalty.remove()
    if relations is not None:
        best.relations = [[float(f"{weight:.3g}") for weight in row] for row in relations.tolist()]
    return model, best


def network_for(method: Method) -> type[ColumnPerGroup] | type[PooledWithIntercepts] | type[NetworkPerGroup]:
    """What the groups share in a method."""
    if not method.shared:
        return NetworkPerGroup
    return PooledWithIntercepts if method.key == POOLED else ColumnPerGroup


def _penalty(
    cell: Cell, model: GroupNetwork, optimizer: torch.optim.Optimizer, names: tuple[str, ...]
) -> SaliencyRegularizer | None:
    method = cell.method
    if method.rule is None:
        return None
    options: Mapping[str, Any] = method.saliency
    if method.tuned:
        temperature = {"temperature": cell.setting.values["temperature"]} if method.rule == "entropic" else {}
        relations = RelationWeights(len(names), method.rule, **temperature)
        options = {"metric": method.metric, "relations": relations, **options}
    return by_share(SaliencyRegularizer, model, cell.value, heads="heads", tasks=names, optimizer=optimizer, **options)


def _of_own_groups(learned: Predictor, rows: GroupRows) -> Tensor:
    predicted = learned.for_all_groups(rows.inputs.flatten(0, 1)).view(*rows.targets.shape, -1)
    return predicted.diagonal(dim1=0, dim2=2).T


def _error(predicted: Tensor, targets: Tensor, splits: GroupSplits) -> float:
    return float((predicted - targets).square().mean()) / splits.variance
