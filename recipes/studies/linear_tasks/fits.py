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

from ...methods.attach import Backward
from ..study import Cell
from .closed_forms import CLOSED_FORMS, best_strength
from .problem import FEATURES, TASKS, Problem, Regression, SyntheticData, task_rmse

#: Steps between two looks at the validation split.
LOOK_EVERY = 5


@dataclass
class Fitted:
    """What a training left, as plain numbers.

    Attributes:
        validation_rmse: mean over the tasks.
        best_steps: one, or one for each task; none for a closed form.
        chosen: strengths that a closed form chose: one, or one for each task.
        relations: at the best step.
        test_rmse: of each task, as are the following; empty without a look at the test split.
        error_inside, error_outside: size of the error of the weights in the span of the task's training inputs, and not.
    """

    validation_rmse: float
    best_steps: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    relations: list[list[float]] | None = None
    test_rmse: list[float] = field(default_factory=list)
    error_inside: list[float] = field(default_factory=list)
    error_outside: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What a study keeps."""
        per_task = {"rmse": self.test_rmse, "error_inside": self.error_inside, "error_outside": self.error_outside}
        return {
            "validation": -self.validation_rmse,
            "macro": {name: statistics.fmean(values) for name, values in per_task.items() if values},
            "scores": {task: {"rmse": error} for task, error in zip(TASKS, self.test_rmse)},
            "best_steps": self.best_steps,
            "chosen": self.chosen,
            "relations": self.relations,
        }


def train_linear(cell: Cell, data: Any = None, folder: Path | None = None) -> Fitted:
    """Learn the weights of all tasks, choosing on the validation split alone. It needs no data, and leaves no checkpoint."""
    del data, folder
    problem = Problem(**{entry.name: cell.setting.values[entry.name] for entry in dataclasses.fields(Problem)})
    drawn = problem.draw(cell.seed)
    if cell.method.key in CLOSED_FORMS:
        rmse, chosen, weights = best_strength(cell.method.key, drawn)
        fitted = Fitted(float(rmse.mean()), chosen=chosen)
    else:
        fitted, weights = _train_adam(cell, drawn)
    if cell.reported:
        fitted.test_rmse = drawn.test.rmse(weights).tolist()
        error, inputs = weights - drawn.weights, drawn.train.inputs
        inside = (torch.linalg.pinv(inputs) @ inputs @ error.unsqueeze(-1)).squeeze(-1)
        fitted.error_inside = inside.norm(dim=1).tolist()
        fitted.error_outside = (error - inside).norm(dim=1).tolist()
    return fitted


class LinearTasks(nn.Module):
    """All tasks see every input; task ``t`` is column ``t``. There is no intercept, as in the truth.

    Args:
        shared_layer: whether all tasks share a linear layer before the columns. It could be multiplied into them: what can
            be learned is the same, how it is learned is not.
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
    rate = cell.value.get("learning_rate", values["learning_rate"])
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=True)
    backward = _backward(cell, model, optimizer)
    inputs, targets = data.train.inputs.flatten(0, 1).float(), data.train.targets.float().T  # [T*N, F], [N, T]
    samples = len(targets)
    # Tasks that share nothing have a best step each; with a rule or a shared layer, there is one best step.
    best = _BestStep(data.validation, apart=cell.method.rule is None and not cell.method.shared)
    for step in range(1, values["steps"] + 1):
        outputs = model(inputs).view(len(TASKS), samples, len(TASKS)).diagonal(dim1=0, dim2=2)  # [N, T]
        losses = (outputs - targets).square().mean(0)
        optimizer.zero_grad()
        backward(losses)
        optimizer.step()
        if step % LOOK_EVERY == 0 or step == values["steps"]:
            best.look(step, model.weights(), backward)
            if step - best.latest >= values["patience"]:
                break
    return Fitted(float(best.rmse.mean()), best.steps.tolist(), relations=best.relations), best.weights.double()


def _backward(cell: Cell, model: nn.Module, optimizer: torch.optim.Optimizer) -> Backward:
    method, value = cell.method, cell.value
    names = {"temperature": "temperature", "relation_rate": "learning_rate"}
    options = {name: value[own] for own, name in names.items() if own in value}

    def regularizer(surgery: Any) -> SaliencyRegularizer:
        return SaliencyRegularizer(
            model,
            heads="head",
            tasks=TASKS,
            strength=value["strength"],
            metric=method.metric,
            relations=RelationWeights(len(TASKS), method.rule or "fixed", **options),
            optimizer=optimizer,
            surgery=surgery,
        )

    build = None if method.rule is None else regularizer
    return Backward(model, "head", TASKS, optimizer, method.surgery, build, cell.seed)


class _BestStep:
    """The weights with the lowest validation RMSE, of each task or of their mean."""

    def __init__(self, validation: Regression, apart: bool) -> None:
        self._inputs, self._targets = validation.inputs.float(), validation.targets.float()
        self._apart = apart
        self.rmse = torch.full((len(TASKS),), math.inf)
        self.weights = torch.zeros(len(TASKS), FEATURES)
        self.steps = torch.zeros(len(TASKS), dtype=torch.int64)
        self.latest = 0
        self.relations: list[list[float]] | None = None

    def look(self, step: int, weights: Tensor, backward: Backward) -> None:
        rmse = task_rmse(weights, self._inputs, self._targets)
        better = rmse < self.rmse if self._apart else (rmse.mean() < self.rmse.mean()).expand(len(rmse))
        if better.any():
            self.rmse = torch.where(better, rmse, self.rmse)
            self.weights = torch.where(better.unsqueeze(1), weights, self.weights)
            self.steps = torch.where(better, step, self.steps)
            self.latest = step
            self.relations = backward.relations
