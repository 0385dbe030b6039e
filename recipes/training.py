"""One training of one method, with the best epoch found on the validation split."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from saliency_reg import RelationWeights, SaliencyRegularizer

from .conflicts import ConflictWatch
from .data import Examples, Splits
from .metrics import task_auc, task_metrics
from .models import SeparateNetworks, SharedNetwork, TaskModel, task_losses
from .surgery import Backward, Surgery

__all__ = ["Job", "Method", "Schedule", "Trained", "train"]


@dataclass(frozen=True)
class Method:
    """A way to train the tasks; each has exactly one hyper-parameter that is tuned."""

    key: str
    label: str
    shared: bool = True
    rule: str | None = None
    """Relation rule of SRDML; without one there is no regularizer."""
    surgery: Surgery | None = None

    @property
    def parameter(self) -> str:
        return "weight decay" if self.rule is None else "strength"


@dataclass(frozen=True)
class Schedule:
    """What is the same for all methods."""

    epochs: int
    batch_size: int
    learning_rate: float
    activation: str
    """Of the heads."""
    temperature: float | None = None
    """Of the ``entropic`` rule; the library's default if ``None``."""


@dataclass(frozen=True)
class Job:
    """One training: a method with a value of its hyper-parameter and a seed; only a reported one sees the test split."""

    method: Method
    value: float
    seed: int
    reported: bool


@dataclass
class Trained:
    """What a training left, as plain numbers."""

    job: Job
    best_epochs: dict[str, int]
    validation_auc: float
    """Mean over the tasks, each at its best epoch; so is the loss."""
    validation_loss: float
    curves: dict[str, list[float]]
    """One value for each epoch. Share of conflicting task gradients: only of reported trainings with shared features."""
    relations: list[list[float]] | None = None
    """At the best epoch."""
    test: dict[str, list[float]] = field(default_factory=dict)
    """Metric to its value for each task."""


def train(job: Job, split: Callable[[int], Splits], schedule: Schedule) -> Trained:
    """Train one model for all epochs, and keep the best epoch of each of its parts.

    The same seed means the same initial weights, batches and images for every method with the same model.

    Args:
        job: what to train.
        split: the data of a seed.
        schedule: what all methods have in common.
    """
    splits = split(job.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        network = SharedNetwork if job.method.shared else SeparateNetworks
        model: TaskModel = network(splits.tasks, schedule.activation)
    decay = job.value if job.method.rule is None else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=decay, foreach=True)
    watch = ConflictWatch(model) if job.reported and isinstance(model, SharedNetwork) else None
    backward = _backward(job, model, optimizer, schedule)
    batches = torch.Generator().manual_seed(job.seed)
    best = _BestEpochs(model)
    curves: dict[str, list[float]] = {"training_loss": [], "validation_loss": [], "validation_auc": []}
    for _ in range(schedule.epochs):
        curves["training_loss"].append(_train_epoch(model, optimizer, backward, splits, schedule.batch_size, batches))
        logits = _predict(model, splits.validation)
        losses = _loss_per_task(logits, splits.validation.labels)
        areas = task_auc(logits, splits.validation.labels)
        curves["validation_loss"].append(float(losses.mean()))
        curves["validation_auc"].append(float(areas.mean()))
        if watch is not None:
            curves.setdefault("conflicts", []).append(watch.measure(splits.train))
        best.update(areas, losses, backward)
    best.restore()
    trained = Trained(job, best.epochs, *best.scores(), curves, best.relations)
    if job.reported:
        trained.test = task_metrics(_predict(model, splits.test), splits.test.labels)
    return trained


def _train_epoch(
    model: TaskModel,
    optimizer: torch.optim.Optimizer,
    backward: Backward,
    splits: Splits,
    batch_size: int,
    generator: torch.Generator,
) -> float:
    """Mean task loss of the epoch, without the penalty."""
    model.train()
    total = 0.0
    order = torch.randperm(len(splits.train.inputs), generator=generator)
    for rows in order.split(batch_size):
        losses = task_losses(model(splits.train.inputs[rows]), splits.train.labels[rows])
        optimizer.zero_grad()
        backward(losses)
        optimizer.step()
        total += torch.stack(losses).mean().item() * len(rows)
    return total / len(order)


def _backward(job: Job, model: TaskModel, optimizer: torch.optim.Optimizer, schedule: Schedule) -> Backward:
    rule, strength = job.method.rule, job.value

    def regularizer(surgery: Any) -> SaliencyRegularizer:
        if rule == "authors":
            # Their penalty is summed over the batch, where the other rules take the mean.
            return SaliencyRegularizer.authors(
                model, heads="heads", strength=strength / schedule.batch_size, optimizer=optimizer, surgery=surgery
            )
        relations: str | RelationWeights = rule or "fixed"
        if rule == "entropic" and schedule.temperature is not None:
            relations = RelationWeights(len(model.tasks), rule, temperature=schedule.temperature)
        return SaliencyRegularizer(
            model, heads="heads", strength=strength, relations=relations, optimizer=optimizer, surgery=surgery
        )

    build = None if rule is None else regularizer
    return Backward(model, "heads", model.tasks, optimizer, job.method.surgery, build, job.seed)


@torch.no_grad()
def _predict(model: TaskModel, examples: Examples) -> Tensor:
    model.eval()
    return torch.stack(list(model(examples.inputs).values()), dim=1)


def _loss_per_task(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0)


class _BestEpochs:
    """The highest validation AUC of each independent part of a model, and the weights that it had then.

    Not the lowest loss: that comes early where a method grows overconfident, before all tasks have learned to say yes,
    and compares how well methods are calibrated rather than how well they tell classes apart. Ties go to the loss.
    """

    def __init__(self, model: TaskModel) -> None:
        self._tasks = model.tasks
        self._parts = model.parts()
        self._best = [(-math.inf, -math.inf) for _ in self._parts]
        # A training that diverges at once has the initial weights, as epoch 0.
        self._states = [copy.deepcopy(module.state_dict()) for _, module in self._parts]
        self._epoch = 0
        self.epochs = dict.fromkeys(self._tasks, 0)
        self.relations: list[list[float]] | None = None

    def update(self, areas: Tensor, losses: Tensor, backward: Backward) -> None:
        self._epoch += 1
        for index, (tasks, module) in enumerate(self._parts):
            columns = [self._tasks.index(task) for task in tasks]
            score = (float(areas[columns].mean()), -float(losses[columns].mean()))
            if score > self._best[index]:
                self._best[index] = score
                self._states[index] = copy.deepcopy(module.state_dict())
                self.epochs.update(dict.fromkeys(tasks, self._epoch))
                self.relations = backward.relations

    def restore(self) -> None:
        for (_, module), state in zip(self._parts, self._states):
            module.load_state_dict(state)

    def scores(self) -> tuple[float, float]:
        """AUC and loss, mean over the tasks."""
        shares = [len(tasks) / len(self._tasks) for tasks, _ in self._parts]
        area = sum(share * area for share, (area, _) in zip(shares, self._best))
        return area, sum(-share * loss for share, (_, loss) in zip(shares, self._best))
