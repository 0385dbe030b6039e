"""One learning of all linear tasks: in closed form, or by Adam with the best step found on the validation split."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer

from ...methods.attach import by_share
from ...methods.backward import Backward
from ..study import Cell
from .closed_forms import CLOSED_FORMS, best_strength
from .problem import FEATURES, TASKS, Problem, SyntheticData

#: Steps between two looks at the validation split.
LOOK_EVERY = 5


@dataclass
class Fitted:
    """What a training left, as plain numbers.

    Attributes:
        validation: minus the RMSE, mean over the tasks.
        best_steps: of each task; none for a closed form.
        chosen: strengths that a closed form chose: one, or one for each task.
        relations: at the best step.
        scores: of each task: test RMSE, and the size of the error of its weights in and outside of the span of its inputs.
        macro: their means; of a trial both are empty.
    """

    validation: float
    best_steps: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    relations: list[list[float]] | None = None
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    macro: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def train_linear(cell: Cell, data: Any = None, folder: Path | None = None) -> Fitted:
    """Learn the weights of all tasks, choosing on the validation split alone. It needs no data, and leaves no checkpoint."""
    del data, folder
    problem = Problem(**{entry.name: cell.setting.values[entry.name] for entry in dataclasses.fields(Problem)})
    drawn = problem.draw(cell.seed)
    if cell.method.key in CLOSED_FORMS:
        rmse, chosen, weights = best_strength(cell.method.key, drawn)
        fitted = Fitted(-float(rmse.mean()), chosen=chosen)
    else:
        fitted, weights = _train_adam(cell, drawn)
    if cell.reported:
        error, inputs = weights - drawn.weights, drawn.train.inputs
        inside = (torch.linalg.pinv(inputs) @ inputs @ error.unsqueeze(-1)).squeeze(-1)
        outside = (error - inside).norm(dim=1)
        scores = {"rmse": drawn.test.rmse(weights), "error_inside": inside.norm(dim=1), "error_outside": outside}
        found = {name: values.tolist() for name, values in scores.items()}
        fitted.scores = {task: dict(zip(found, values)) for task, values in zip(TASKS, zip(*found.values()))}
        fitted.macro = {name: statistics.fmean(values) for name, values in found.items()}
    return fitted


class LinearTasks(nn.Module):
    """All tasks see every input; task ``t`` is column ``t``. There is no intercept, as in the truth.

    A layer that all tasks share could be multiplied into the columns: what can be learned is the same, but not how.
    """

    def __init__(self, shared_layer: bool) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, len(TASKS), bias=False)
        self.backbone = nn.Linear(FEATURES, FEATURES, bias=False) if shared_layer else None

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(inputs if self.backbone is None else self.backbone(inputs))
        return output

    def weights(self) -> Tensor:
        """``[T, FEATURES]``, from the inputs to the tasks."""
        head = self.head.weight.detach()
        return head if self.backbone is None else head @ self.backbone.weight.detach()


def _train_adam(cell: Cell, data: SyntheticData) -> tuple[Fitted, Tensor]:
    """Full-batch Adam from small random weights, and the weights of the best step by validation RMSE."""
    values = cell.setting.values
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        model = LinearTasks(cell.method.shared)
    rate = {**values, **_hyper_parameters(cell)}["learning_rate"]
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=True)
    backward = _backward(cell, model, optimizer)
    inputs, targets = data.train.inputs.flatten(0, 1).float(), data.train.targets.float().T  # [T*N, F], [N, T]
    # Tasks that share nothing have a best step each; with a rule or a shared layer, there is one best step.
    apart = cell.method.rule is None and not cell.method.shared
    best_rmse, best_weights = torch.full((len(TASKS),), math.inf), torch.zeros(len(TASKS), FEATURES)
    best_steps, latest, relations = torch.zeros(len(TASKS), dtype=torch.int64), 0, None
    for step in range(1, values["steps"] + 1):
        outputs = model(inputs).view(len(TASKS), -1, len(TASKS)).diagonal(dim1=0, dim2=2)  # [N, T]
        losses = (outputs - targets).square().mean(0)
        optimizer.zero_grad()
        backward(losses, arguments={} if cell.method.tuned else {"losses": losses.detach().sum()})
        optimizer.step()
        if step % LOOK_EVERY and step < values["steps"]:
            continue
        weights = model.weights()
        rmse = data.validation.rmse(weights)
        better = rmse < best_rmse if apart else (rmse.mean() < best_rmse.mean()).expand(len(rmse))
        if better.any():
            best_rmse = torch.where(better, rmse, best_rmse)
            best_weights = torch.where(better.unsqueeze(1), weights, best_weights)
            best_steps = torch.where(better, step, best_steps)
            latest, relations = step, backward.relations
        if step - latest >= values["patience"]:
            break
    return Fitted(-float(best_rmse.mean()), best_steps.tolist(), relations=relations), best_weights.double()


def _hyper_parameters(cell: Cell) -> dict[str, Any]:
    """By name; a method that is not tuned has none."""
    return dict(cell.value) if cell.method.tuned else {}


def _backward(cell: Cell, model: nn.Module, optimizer: torch.optim.Optimizer) -> Backward:
    method, value = cell.method, _hyper_parameters(cell)
    names = {"temperature": "temperature", "relation_rate": "learning_rate"}
    options = {name: value[own] for own, name in names.items() if own in value}

    def regularizer(surgery: Any) -> SaliencyRegularizer:
        common: dict[str, Any] = {"heads": "head", "tasks": TASKS, "optimizer": optimizer, "surgery": surgery}
        if not method.tuned:
            return by_share(SaliencyRegularizer, model, method.fixed, **common)
        relations = RelationWeights(len(TASKS), method.rule or "fixed", **options)
        return SaliencyRegularizer(
            model, strength=value["strength"], metric=method.metric, relations=relations, **common
        )

    build = None if method.rule is None else regularizer
    return Backward(model, "head", TASKS, optimizer, method.surgery, build, cell.seed)
