"""How the linear tasks are learned: in closed form, or by Adam with and without the saliency regularizer."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import RelationWeights, SaliencyRegularizer

from .synthetic_data import FEATURES, TASKS, Problem, Regression, SyntheticData, task_rmse

__all__ = [
    "METHODS",
    "SINGLE_TASK",
    "Fitted",
    "Job",
    "Method",
    "Schedule",
    "Setting",
    "fit",
    "mean_regularised",
    "pooled",
    "ridge",
    "train_adam",
]

#: Values of the one hyper-parameter of the closed forms. They cost nothing, so that there are many.
CLOSED_FORM_STRENGTHS = tuple(10 ** (exponent / 4) for exponent in range(-24, 13))
#: Steps between two looks at the validation split.
LOOK_EVERY = 5


@dataclass(frozen=True)
class Setting:
    """Hyper-parameters of one trial; what does not apply is ``None``."""

    strength: float | None = None
    temperature: float | None = None
    relation_rate: float | None = None
    """Learning rate of the relations."""
    learning_rate: float | None = None
    """Of Adam, where it is tuned."""

    def __str__(self) -> str:
        names = {
            "strength": self.strength,
            "temperature": self.temperature,
            "relation rate": self.relation_rate,
            "learning rate": self.learning_rate,
        }
        return ", ".join(f"{name} {value:g}" for name, value in names.items() if value is not None) or "-"


@dataclass(frozen=True)
class Method:
    """A way to learn the tasks, and the settings that are tried on the tuning seeds."""

    key: str
    label: str
    settings: tuple[Setting, ...] = ()
    """Empty for the closed forms, whose one hyper-parameter is chosen on the validation split of every seed."""
    rule: str | None = None
    metric: str = "l1"


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


def _half_decades(first: int) -> tuple[float, ...]:
    """Twelve values from ``10 ** first`` on."""
    return tuple(factor * 10.0 ** (first + decade) for decade in range(6) for factor in (1, 3))


def _srdml() -> tuple[Method, ...]:
    methods = []
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    for metric, uniform, strengths, temperatures, projected_rates in (
        ("l1", _half_decades(-3), (1.0, 3.0, 10.0), (0.05, 0.07, 0.1, 0.2), rates),
        (
            "sqchordal",
            _half_decades(-1),
            (100.0, 300.0, 1000.0),
            (0.1, 0.3, 1.0, 3.0),
            (1e-7, 1e-6, 1e-5, 1e-4),
        ),
    ):
        per_rule = {
            "entropic": [Setting(strength, temperature=value) for value in temperatures for strength in strengths],
            "projected": [
                Setting(strength, relation_rate=value) for value in projected_rates for strength in strengths
            ],
            "authors": [Setting(strength, relation_rate=value) for value in rates for strength in strengths],
            "fixed": [Setting(strength) for strength in uniform],
        }
        for rule, settings in per_rule.items():
            name = "uniform weights" if rule == "fixed" else rule
            methods.append(Method(f"{metric}_{rule}", f"SRDML, {metric}, {name}", tuple(settings), rule, metric))
    return tuple(methods)


_LEARNING_RATES = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5)
SINGLE_TASK = ("single_adam", "single_ridge")
METHODS = {
    method.key: method
    for method in (
        Method(
            "single_adam",
            "Single-task, early stopping",
            tuple(Setting(learning_rate=rate) for rate in _LEARNING_RATES),
        ),
        Method("single_ridge", "Single-task, ridge"),
        Method("mean_regularised", "Mean-regularised (RMTL)"),
        Method("pooled", "One pooled regressor"),
        *_srdml(),
    )
}


def fit(job: Job, problem: Problem, schedule: Schedule) -> Fitted:
    """Learn the weights of all tasks, choosing on the validation split alone."""
    data = problem.draw(job.seed)
    if job.method.key in _CLOSED_FORMS:
        fitted, weights = _best_strength(job, data, _CLOSED_FORMS[job.method.key])
    else:
        fitted, weights = train_adam(job, data, schedule)
    if job.reported:
        fitted.test_rmse = data.test.rmse(weights).tolist()
        inside, outside = _split_error(weights - data.weights, data.train.inputs)
        fitted.error_inside, fitted.error_outside = inside.tolist(), outside.tolist()
    return fitted


# Closed forms: weights [T, F] for a strength. All are the minimum of the sum over the tasks of the mean squared error.


def ridge(train: Regression, strength: float) -> Tensor:
    """Each task alone, plus ``strength * sum_t |w_t|^2``."""
    inputs, targets = train.inputs, train.targets.unsqueeze(-1)
    gram = inputs.mT @ inputs / inputs.shape[1] + strength * torch.eye(inputs.shape[2], dtype=inputs.dtype)
    weights: Tensor = torch.linalg.solve(gram, inputs.mT @ targets / inputs.shape[1])
    return weights.squeeze(-1)


def pooled(train: Regression, strength: float) -> Tensor:
    """One regressor for the samples of all tasks, plus ``strength * |w|^2``."""
    together = Regression(train.inputs.flatten(0, 1).unsqueeze(0), train.targets.flatten().unsqueeze(0))
    return ridge(together, strength).expand(len(train.inputs), -1)


def mean_regularised(train: Regression, strength: float) -> Tensor:
    """RMTL: plus ``strength * sum_t |w_t - mean|^2`` (Evgeniou and Pontil 2004), with ``mean`` that of the ``w_t``."""
    tasks, samples, features = train.inputs.shape
    identity = torch.eye(features, dtype=train.inputs.dtype)
    centring = torch.eye(tasks, dtype=train.inputs.dtype) - 1 / tasks
    system = torch.block_diag(*(train.inputs.mT @ train.inputs / samples)) + strength * torch.kron(centring, identity)
    right = (train.inputs.mT @ train.targets.unsqueeze(-1) / samples).flatten()
    # Nothing holds the mean in directions that no task sees: there the smallest weights are taken.
    inverse: Tensor = torch.linalg.pinv(system, rtol=1e-12, hermitian=True)
    return (inverse @ right).view(tasks, features)


_CLOSED_FORMS: dict[str, Callable[[Regression, float], Tensor]] = {
    "single_ridge": ridge,
    "mean_regularised": mean_regularised,
    "pooled": pooled,
}


def _best_strength(
    job: Job, data: SyntheticData, solve: Callable[[Regression, float], Tensor]
) -> tuple[Fitted, Tensor]:
    candidates = torch.stack([solve(data.train, strength) for strength in CLOSED_FORM_STRENGTHS])  # [S, T, F]
    errors = data.validation.rmse(candidates)
    if job.method.key == "single_ridge":  # nothing is shared, so each task has a strength of its own
        best = errors.argmin(0)
    else:
        best = errors.mean(1).argmin().expand(len(TASKS))
    tasks = torch.arange(len(TASKS))
    used = best if job.method.key == "single_ridge" else best[:1]
    chosen = [CLOSED_FORM_STRENGTHS[index] for index in used.tolist()]
    return Fitted(job, float(errors[best, tasks].mean()), chosen=chosen), candidates[best, tasks]


# Adam.


class _LinearTasks(nn.Module):
    """All tasks see every input; task ``t`` is column ``t``. There is no intercept, as in the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, len(TASKS), bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(inputs)
        return output


def train_adam(job: Job, data: SyntheticData, schedule: Schedule) -> tuple[Fitted, Tensor]:
    """Full-batch Adam from small random weights, and the weights of the best step by validation RMSE.

    Without a rule the tasks share nothing, and each has a best step of its own. With one, there is one best step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = _LinearTasks()
    setting = job.setting
    rate = schedule.learning_rate if setting.learning_rate is None else setting.learning_rate
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=True)
    regularizer = None if job.method.rule is None else _attach(job.method, setting, model, optimizer)
    inputs, targets = data.train.inputs.flatten(0, 1).float(), data.train.targets.float().T  # [T*N, F], [N, T]
    samples = len(targets)
    best = _BestStep(data.validation, apart=regularizer is None)
    for step in range(1, schedule.steps + 1):
        outputs = model(inputs).view(len(TASKS), samples, len(TASKS)).diagonal(dim1=0, dim2=2)  # [N, T]
        loss = (outputs - targets).square().mean(0).sum()
        if regularizer is not None:
            loss = loss + regularizer()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % LOOK_EVERY == 0 or step == schedule.steps:
            best.look(step, model.head.weight.detach(), regularizer)
            if step - best.latest >= schedule.patience:
                break
    if regularizer is not None:
        regularizer.remove()
    return Fitted(job, float(best.rmse.mean()), best.steps.tolist(), relations=best.relations), best.weights.double()


def _attach(
    method: Method, setting: Setting, model: nn.Module, optimizer: torch.optim.Optimizer
) -> SaliencyRegularizer:
    options: dict[str, Any] = {}
    if setting.temperature is not None:
        options["temperature"] = setting.temperature
    if setting.relation_rate is not None:
        options["learning_rate"] = setting.relation_rate
    return SaliencyRegularizer(
        model,
        heads="head",
        tasks=TASKS,
        strength=setting.strength or 0.0,
        metric=method.metric,
        relations=RelationWeights(len(TASKS), method.rule or "fixed", **options),
        optimizer=optimizer,
    )


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

    def look(self, step: int, weights: Tensor, regularizer: SaliencyRegularizer | None) -> None:
        rmse = task_rmse(weights, self._inputs, self._targets)
        better = rmse < self.rmse if self._apart else (rmse.mean() < self.rmse.mean()).expand(len(rmse))
        if better.any():
            self.rmse = torch.where(better, rmse, self.rmse)
            self.weights = torch.where(better.unsqueeze(1), weights, self.weights)
            self.steps = torch.where(better, step, self.steps)
            self.latest = step
            if regularizer is not None:
                self.relations = regularizer.relations.matrix().tolist()


def _split_error(error: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Size of an error ``[T, F]`` inside and outside of the span of each task's inputs ``[T, N, F]``."""
    inside = (torch.linalg.pinv(inputs) @ inputs @ error.unsqueeze(-1)).squeeze(-1)
    return inside.norm(dim=1), (error - inside).norm(dim=1)
