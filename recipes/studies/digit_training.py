"""One training of one method, with the best epoch found on the validation split."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.sources import Splits
from ..methods.attach import Backward, Surgery
from ..methods.conflicts import ConflictWatch
from ..methods.methods import backward_of
from ..models.small_networks import SeparateNetworks, SharedNetwork, TaskModel
from ..runtime.errors import CheckpointError
from ..runtime.files import write_json
from ..runtime.processes import Ranks, open_accelerator
from ..training.best_weights import BestWeights
from ..training.binary_objective import BinaryTasks
from ..training.checkpoints import Checkpoints
from ..training.digit_metrics import task_auc, task_metrics
from ..training.engine import Engine, Plan

__all__ = ["DTYPES", "Job", "Method", "Schedule", "Trained", "train"]

DTYPES = {"float32": torch.float32, "float64": torch.float64}
#: Within the folder of a run.
TRAININGS = "trainings"


@dataclass(frozen=True)
class Method:
    """A way to train the tasks; each has exactly one hyper-parameter that is tuned."""

    key: str
    label: str
    shared: bool = True
    rule: str | None = None
    """Relation rule of SRDML; without one there is no regularizer."""
    surgery: Surgery | None = None
    metric: str = "l1"
    """Of the distance between saliencies."""

    @property
    def parameter(self) -> str:
        return "weight decay" if self.rule is None else "strength"


@dataclass(frozen=True)
class Schedule:
    """What is the same for all methods."""

    epochs: int
    batch_size: int
    """Of all processes and micro-batches together."""
    learning_rate: float
    activation: str
    """Of the heads."""
    temperature: float | None = None
    """Of the ``entropic`` rule; the library's default if ``None``."""
    dtype: str = "float32"
    accumulation: int = 1
    mixed_precision: str = "no"
    data_workers: int = 0
    clip_norm: float | None = None
    checkpoint_steps: int = 0
    trackers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One training: a method with a value of its hyper-parameter and a seed; only a reported one sees the test split."""

    method: Method
    value: float
    seed: int
    reported: bool

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method.key}_{self.value!r}_seed-{self.seed}_{'reported' if self.reported else 'trial'}"


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
    restored: bool = field(default=False, compare=False)
    """Was finished before, and not trained again."""
    not_written: tuple[str, str] | None = field(default=None, compare=False)
    """File and reason, if the result could not be saved."""

    def save(self, path: Path) -> None:
        """Write what was trained and measured."""
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name != "job" and entry.compare
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, values)

    @classmethod
    def load(cls, path: Path, job: Job) -> Trained:
        """What :meth:`save` has written.

        Raises:
            CheckpointError: something else, or it cannot be read now.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read now ({error.strerror}). Try again.") from error
        try:
            found = cls(job, **json.loads(text), restored=True)
            # JSON has no numbers that are not finite: of a training that diverged.
            found.validation_auc = -math.inf if found.validation_auc is None else found.validation_auc
            found.validation_loss = math.inf if found.validation_loss is None else found.validation_loss
            found.curves = {
                name: [math.nan if value is None else value for value in curve] for name, curve in found.curves.items()
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is no result of this version ({error}). Remove it to train again."
            ) from error
        return found


def train(
    job: Job,
    split: Callable[[int], Splits],
    schedule: Schedule,
    folder: Path | None = None,
    resume: str = "never",
) -> Trained:
    """Train one model for all epochs, and keep the best epoch of each of its parts.

    The same seed means the same initial weights, batches and images for every method with the same model. With several
    processes, all of them have to call this; each gets the result.

    Args:
        job: what to train.
        split: the data of a seed.
        schedule: what all methods have in common.
        folder: of the run, for the result, the log and checkpoints; nothing is written without one.
        resume: ``"auto"``: return what was finished there, and go on with what was not.
    """
    own_folder = None if folder is None else folder / TRAININGS / job.name
    accelerator = open_accelerator(schedule.mixed_precision, trackers=schedule.trackers, folder=own_folder)
    ranks = Ranks(accelerator)
    result = None if own_folder is None else own_folder / "result.json"
    if result is not None and resume == "auto":
        finished = _finished(result, job, ranks)
        if finished is not None:
            if ranks.is_main:  # it may have been killed just before
                Checkpoints(result.parent).remove_all()
            return finished
    training = _Training(job, split(job.seed), schedule, accelerator, own_folder)
    trained = ranks.from_main(training.run(resume))
    if result is not None and ranks.is_main:
        try:
            trained.save(result)
        except OSError as error:
            reason = error.strerror or str(error)
            warnings.warn(
                f"{result} could not be written ({reason}). The result is kept in memory, and the run goes on.",
                stacklevel=2,
            )
            trained.not_written = (str(result), reason)
        else:
            training.engine.remove_checkpoints()
    return trained  # type: ignore[no-any-return]


def _finished(result: Path, job: Job, ranks: Ranks) -> Trained | None:
    own: Trained | None = None
    failure: CheckpointError | None = None
    if ranks.is_main and result.exists():
        try:
            own = Trained.load(result, job)
        except CheckpointError as error:
            failure = error
    # An error of the main process is one of all: the others would wait.
    found, failed = ranks.from_main((own, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    if failed is not None:
        raise CheckpointError(failed)
    return found  # type: ignore[no-any-return]


class _Training:
    """The parts of one training, put together."""

    def __init__(self, job: Job, splits: Splits, schedule: Schedule, accelerator: Any, folder: Path | None) -> None:
        self._job = job
        self._splits = splits
        tasks = splits.tasks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            network = SharedNetwork if job.method.shared else SeparateNetworks
            model: TaskModel = network(tasks, schedule.activation).to(DTYPES[schedule.dtype])
        decay = job.value if job.method.rule is None else 0.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=decay, foreach=True)
        self._watch = ConflictWatch(model) if job.reported and isinstance(model, SharedNetwork) else None
        self._backward = backward_of(
            job.method,
            model,
            tasks,
            optimizer,
            strength=job.value,
            batch_size=schedule.batch_size,
            seed=job.seed,
            temperature=schedule.temperature,
            process_group=Ranks(accelerator).group,
        )
        self._progress = _Progress(model)
        self.engine = Engine(
            accelerator,
            model,
            optimizer,
            self._backward,
            BinaryTasks(tasks, apart=self._backward.averages_itself),
            splits.train,
            Plan(
                epochs=schedule.epochs,
                batch_size=schedule.batch_size,
                seed=job.seed,
                accumulation=schedule.accumulation,
                clip_norm=schedule.clip_norm,
                data_workers=schedule.data_workers,
                checkpoint_steps=schedule.checkpoint_steps,
            ),
            folder=folder,
            stateful={"progress": self._progress},
            tracked=(
                ("digits", {"method": job.method.key, job.method.parameter: job.value, "seed": job.seed})
                if schedule.trackers
                else None
            ),
        )

    def run(self, resume: str) -> Trained:
        """Train, and go back to the best epochs."""
        self.engine.run(self._after_epoch, resume)
        progress = self._progress
        progress.best.restore()
        trained = Trained(
            self._job, progress.epochs_of_tasks(), *progress.scores(), progress.curves, progress.relations
        )
        if self._job.reported:
            found = self.engine.evaluate(self._splits.test)
            trained.test = task_metrics(found["logits"], found["labels"])
        return trained

    def _after_epoch(self, epoch: int, training_losses: Sequence[float]) -> dict[str, float]:
        found = self.engine.evaluate(self._splits.validation)
        losses = _loss_per_task(found["logits"], found["labels"])
        areas = task_auc(found["logits"], found["labels"])
        figures = {
            "training_loss": sum(training_losses) / len(training_losses),
            "validation_loss": float(losses.mean()),
            "validation_auc": float(areas.mean()),
        }
        if self._watch is not None:
            figures["conflicts"] = self._watch.measure(self._splits.train)
        self._progress.update(epoch, figures, areas, losses, self._backward)
        return figures


def _loss_per_task(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(0)


class _Progress:
    """The curves so far, and the best epochs: those of the highest validation AUC, for each independent part of the model.

    Not the lowest loss: that comes early where a method grows overconfident, before all tasks have learned to say yes,
    and compares how well methods are calibrated rather than how well they tell classes apart. Ties go to the loss.
    """

    def __init__(self, model: TaskModel) -> None:
        self._tasks = model.tasks
        self._tasks_of_parts = [tasks for tasks, _ in model.parts()]
        # A training that diverges at once has the initial weights, as epoch 0.
        self.best = BestWeights([module for _, module in model.parts()], (-math.inf, -math.inf))
        self.curves: dict[str, list[float]] = {}
        self.relations: list[list[float]] | None = None

    def update(
        self, epoch: int, figures: Mapping[str, float], areas: Tensor, losses: Tensor, backward: Backward
    ) -> None:
        for name, value in figures.items():
            self.curves.setdefault(name, []).append(value)
        columns = [[self._tasks.index(task) for task in tasks] for tasks in self._tasks_of_parts]
        scores = [(float(areas[own].mean()), -float(losses[own].mean())) for own in columns]
        if self.best.update(epoch, scores):
            self.relations = backward.relations

    def epochs_of_tasks(self) -> dict[str, int]:
        return {task: epoch for tasks, epoch in zip(self._tasks_of_parts, self.best.epochs) for task in tasks}

    def scores(self) -> tuple[float, float]:
        """AUC and loss, mean over the tasks."""
        shares = [len(tasks) / len(self._tasks) for tasks in self._tasks_of_parts]
        area = sum(share * area for share, (area, _) in zip(shares, self.best.scores))
        return area, sum(-share * loss for share, (_, loss) in zip(shares, self.best.scores))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best.state_dict(), "curves": self.curves, "relations": self.relations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best.load_state_dict(state["best"])
        self.curves = {name: list(curve) for name, curve in state["curves"].items()}
        self.relations = state["relations"]
