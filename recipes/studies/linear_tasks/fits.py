"""One learning of all linear tasks: in closed form, or by Adam with the best step found on the validation split."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer

from ...methods.attach import Backward
from .closed_forms import CLOSED_FORMS, best_strength
from .methods import Method, Setting
from .problem import FEATURES, TASKS, Problem, Regression, SyntheticData, task_rmse

__all__ = ["Fitted", "Job", "LinearTasks", "Schedule", "fit", "train_adam"]

#: Steps between two looks at the validation split.
LOOK_EVERY = 5


@dataclass(frozen=True)
class Schedule:
    """What is the same for all methods that are trained."""

    steps: int = 1000
    patience: int = 250
    learning_rate: float = 0.1


@dataclass(frozen=True)
class Job:
    """One training; only a reported one sees the test split."""

    method: Method
    setting: Setting
    seed: int
    reported: bool


@dataclass
class Fitted:
    """What a training left, as plain numbers."""

    job: Job
    validation_rmse: float
    """Mean over the tasks."""
    best_steps: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)
    """Strengths that a closed form chose: one, or one for each task."""
    relations: list[list[float]] | None = None
    """At the best step."""
    test_rmse: list[float] = field(default_factory=list)
    """Of each task, as are the following."""
    error_inside: list[float] = field(default_factory=list)
    """Size of the error of the weights inside the span of the task's training inputs."""
    error_outside: list[float] = field(default_factory=list)


def fit(job: Job, problem: Problem, schedule: Schedule) -> Fitted:
    """Learn the weights of all tasks, choosing on the validation split alone."""
    data = problem.draw(job.seed)
    if job.method.key in CLOSED_FORMS:
        rmse, chosen, weights = best_strength(job.method.key, data)
        fitted = Fitted(job, float(rmse.mean()), chosen=chosen)
    else:
        fitted, weights = train_adam(job, data, schedule)
    if job.reported:
        fitted.test_rmse = data.test.rmse(weights).tolist()
        inside, outside = _split_error(weights - data.weights, data.train.inputs)
        fitted.error_inside, fitted.error_outside = inside.tolist(), outside.tolist()
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


def train_adam(job: Job, data: SyntheticData, schedule: Schedule) -> tuple[Fitted, Tensor]:
    """Full-batch Adam from small random weights, and the weights of the best step by validation RMSE.

    Without a rule and a shared layer the tasks share nothing, and each has a best step of its own. With one of them,
    there is one best step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = LinearTasks(job.method.shared_layer)
    setting = job.setting
    rate = schedule.learning_rate if setting.learning_rate is None else setting.learning_rate
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=True)
    backward = _backward(job, model, optimizer)
    inputs, targets = data.train.inputs.flatten(0, 1).float(), data.train.targets.float().T  # [T*N, F], [N, T]
    samples = len(targets)
    best = _BestStep(data.validation, apart=job.method.shares_nothing)
    for step in range(1, schedule.steps + 1):
        outputs = model(inputs).view(len(TASKS), samples, len(TASKS)).diagonal(dim1=0, dim2=2)  # [N, T]
        losses = (outputs - targets).square().mean(0)
        optimizer.zero_grad()
        backward(losses)
        optimizer.step()
        if step % LOOK_EVERY == 0 or step == schedule.steps:
            best.look(step, model.weights(), backward)
            if step - best.latest >= schedule.patience:
                break
    return Fitted(job, float(best.rmse.mean()), best.steps.tolist(), relations=best.relations), best.weights.double()


def _backward(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer) -> Backward:
    method, setting = job.method, job.setting
    options: dict[str, Any] = {}
    if setting.temperature is not None:
        options["temperature"] = setting.temperature
    if setting.relation_rate is not None:
        options["learning_rate"] = setting.relation_rate

    def regularizer(surgery: Any) -> SaliencyRegularizer:
        return SaliencyRegularizer(
            model,
            heads="head",
            tasks=TASKS,
            strength=setting.strength or 0.0,
            metric=method.metric,
            relations=RelationWeights(len(TASKS), method.rule or "fixed", **options),
            optimizer=optimizer,
            surgery=surgery,
        )

    build = None if method.rule is None else regularizer
    return Backward(model, "head", TASKS, optimizer, method.surgery, build, job.seed)


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


def _split_error(error: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Size of an error ``[T, F]`` inside and outside of the span of each task's inputs ``[T, N, F]``."""
    inside = (torch.linalg.pinv(inputs) @ inputs @ error.unsqueeze(-1)).squeeze(-1)
    return inside.norm(dim=1), (error - inside).norm(dim=1)
