"""The one training loop of all recipes: the same steps for any number of processes and micro-batches, and after a kill."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg.integrations.accelerate import log_report, register

from ..data.sources import Collate, Source
from ..methods.attach import Backward
from ..runtime.errors import OptionError, need
from ..runtime.log import RunLog
from ..runtime.processes import Ranks
from ..runtime.random_state import derived_seed, kept_random_state, seed_all
from ..runtime.termination import Terminated, deferred
from .batches import Feed, GlobalBatches, MicroBatch, Step, even_parts
from .learning_rate import DECAYS, learning_rate_factor
from .loss_sums import LossSums, scaled, weighted_sums
from .objective import Objective
from .resume import Parts, Position, SavedTraining, Stateful

__all__ = ["Engine", "Plan", "Stateful"]

LOG = "log.jsonl"


@dataclass(frozen=True)
class Plan:
    """How long and in which steps a training goes.

    Attributes:
        epochs: how many.
        batch_size: samples of an optimizer step, of all processes and micro-batches together.
        seed: of the batches, of what is drawn for samples, and of what the model draws.
        accumulation: micro-batches of each step.
        clip_norm: largest norm of all gradients together.
        warmup_steps: over which the learning rate rises linearly.
        decay: of the learning rate after that: ``"constant"``, ``"cosine"`` or ``"linear"``, down to 0 with the last step.
        data_workers: processes that load data, for each process that trains.
        evaluation_batch_size: samples of a process that are predicted at once; all if ``None``.
        log_steps: steps between the lines of the log, beside one for each epoch; 0 for none.
        checkpoint_steps: steps between checkpoints; 0 for none but the one that SIGTERM asks for.
        keep_checkpoints: how many are kept.
        progress: draw a bar, on the main process.
    """

    epochs: int
    batch_size: int
    seed: int = 0
    accumulation: int = 1
    clip_norm: float | None = None
    warmup_steps: int = 0
    decay: str = "constant"
    data_workers: int = 0
    evaluation_batch_size: int | None = None
    log_steps: int = 0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    progress: bool = False

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "accumulation": 1, "keep_checkpoints": 1}
        for name in (*least, "warmup_steps", "data_workers", "log_steps", "checkpoint_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, 0):
                raise OptionError(f"{name} must be a whole number from {least.get(name, 0)} on, found {value!r}.")
        if self.evaluation_batch_size is not None and not (
            isinstance(self.evaluation_batch_size, int) and self.evaluation_batch_size > 0
        ):
            raise OptionError(
                f"evaluation_batch_size must be a whole number from 1 on, or None; found {self.evaluation_batch_size!r}."
            )
        if self.clip_norm is not None and not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise OptionError(f"clip_norm must be a finite number above 0, or None; found {self.clip_norm!r}.")
        if self.decay not in DECAYS:
            raise OptionError(f"found the decay {self.decay!r}. Use one of {', '.join(DECAYS)}.")


#: Called after each epoch, which has been counted, with the mean loss of each task in it; returns what is to be logged.
AfterEpoch = Callable[[int, list[float]], Mapping[str, Any]]


class Engine:
    """Trains one model.

    With the same seed a step is the same, up to rounding, for any number of processes and micro-batches (but surgery at the
    feature map weighs each micro-batch on its own, and dropout draws on each process for itself), and to the bit for any
    number of data workers, and after a resume.

    Args:
        accelerator: of :func:`open_accelerator`; one for each engine.
        model: not yet wrapped; is moved to the device.
        optimizer: of its parameters, with groups as wanted.
        backward: what was attached to the model and to the optimizer.
        objective: losses and predictions.
        source: the training data.
        plan: of the training.
        collate: samples to a batch, for all data; PyTorch's by default.
        folder: of the log, checkpoints and trackers; none of them without one.
        stateful: what else belongs into checkpoints, under names.
        tracked: name and options of the run for the trackers of the accelerator.

    Raises:
        OptionError: options that do not go together, or no data.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        backward: Backward,
        objective: Objective,
        source: Source,
        plan: Plan,
        *,
        collate: Collate | None = None,
        folder: Path | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        tracked: tuple[str, Mapping[str, Any]] | None = None,
    ) -> None:
        if len(source) == 0:
            raise OptionError("there are no training samples. Choose other data.")
        self.accelerator = accelerator
        self.model = model
        self.plan = plan
        self.ranks = Ranks(accelerator)
        self.position = Position()
        self._objective = objective
        self._backward = backward
        self._source = source
        self._collate = collate
        self._tracked = tracked
        self._batches = GlobalBatches(
            len(source),
            plan.batch_size,
            plan.seed,
            accumulation=plan.accumulation,
            ranks=self.ranks.size,
            rank=self.ranks.rank,
        )
        total = len(self._batches) * plan.epochs
        factor = learning_rate_factor(plan.decay, plan.warmup_steps, total)
        # Unwrapped by accelerate, which would step it once for each process.
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        # Gradients that the surgery averages must not be averaged again.
        self._wrapped: nn.Module = accelerator.prepare_model(model, evaluation_mode=backward.averages_itself)
        if backward.averages_itself:
            self.ranks.same_weights([*model.parameters(), *model.buffers()])
        self._inner_optimizer = optimizer
        self._prepared_optimizer = accelerator.prepare_optimizer(optimizer)
        for part in backward.attached.values():
            register(part, accelerator)
        self._feeds: dict[int, tuple[Source, Feed]] = {}
        self._log = RunLog(folder / LOG if folder is not None and self.ranks.is_main else None)
        self._of_epoch = LossSums(objective.tasks, accelerator.device)
        self._of_interval = LossSums(objective.tasks, accelerator.device)
        parts = Parts(
            # A position counts steps of these.
            identity=_identity(plan, objective, source, optimizer, accelerator.mixed_precision),
            model=model,
            optimizer=optimizer,
            scheduler=self._scheduler,
            scaler=accelerator.scaler,
            backward=backward,
            others=dict(stateful or {}),
            sums={"epoch": self._of_epoch, "interval": self._of_interval},
            position=self.position,
            seed=plan.seed,
        )
        self._saved: SavedTraining | None = None
        if folder is not None:
            self._saved = SavedTraining(folder, plan.keep_checkpoints, parts, self.ranks, accelerator.device, self._log)
        self._gradient_norm: Tensor | None = None
        self._rates: list[Any] = []
        self._resumed = False
        self._running = False

    # What a recipe calls.

    def run(self, after_epoch: AfterEpoch, resume: str | Path = "never") -> None:
        """Train to the end.

        Args:
            after_epoch: called on all processes with the number of the epoch, from 1 on, and the mean loss of each task.
            resume: ``"auto"``: from the newest checkpoint of the folder that is whole, if there is one. ``"never"``:
                from the beginning, in a folder without checkpoints. A path: from this checkpoint.

        Raises:
            Terminated: SIGTERM came (see :func:`recipes.runtime.termination.listen`); a checkpoint was written, where there
                is a folder.
            CheckpointError: the checkpoint is missing, not whole, or of another training.
            OptionError: there are checkpoints that would be overwritten.
            SaliencyRegError: it is of other tasks.
        """
        device = self.accelerator.device
        with kept_random_state(device), deferred() as asked:
            seed_all(derived_seed("training", self.plan.seed, self.ranks.rank))
            self._resumed = resume != "never"
            if self._saved is not None:
                self._saved.resume(resume)
            elif resume not in ("never", "auto"):
                raise OptionError(f"found resume={str(resume)!r} without a folder. Pass the folder of the training.")
            self._open_trackers()
            self._running = True
            try:
                self._train(after_epoch, asked)
            finally:
                self._running = False
                for _, feed in self._feeds.values():
                    feed.close()
                self._feeds.clear()
                for tracker in self.accelerator.trackers:
                    tracker.finish()  # not end_training(), which ends the process group, too

    @torch.no_grad()
    def evaluate(self, source: Source) -> dict[str, Tensor]:
        """Predictions for all samples in their order, ``[N, ...]`` on the host, each exactly once, on every process.

        Raises:
            OptionError: no samples, or predictions whose rows differ in shape between processes (padded tokens: pad to one
                length).
        """
        if len(source) == 0:
            raise OptionError("there are no samples to predict. Choose other data.")
        self.model.eval()
        fed = set(self._feeds)
        self.ranks.same_weights(list(self.model.buffers()))  # statistics of normalisations are each process' own
        sizes = even_parts(len(source), self.ranks.size)
        start = sum(sizes[: self.ranks.rank])
        own = range(start, start + sizes[self.ranks.rank])
        at_once = max(self.plan.evaluation_batch_size or len(own), 1)
        wanted = [MicroBatch(-1, own[first : first + at_once], 0) for first in range(0, len(own), at_once)]
        # A process without samples predicts one for the format, and drops it.
        parts = [
            self._objective.predictions(self.model, self._on_device(batch))
            for batch in self._load(source, wanted or [MicroBatch(-1, [0], 0)])
        ]
        if not self._running:  # in a run, data workers stay for the next epoch
            for key in set(self._feeds) - fed:
                self._feeds.pop(key)[1].close()
        joined = {name: torch.cat([part[name] for part in parts])[: len(own)] for name in parts[0]}
        return {name: self.ranks.rows_of_all(rows, sizes) for name, rows in joined.items()}

    def remove_checkpoints(self) -> None:
        """For a training whose result is kept elsewhere."""
        if self._saved is not None and self.ranks.is_main:
            self._saved.checkpoints.remove_all()

    # The loop.

    def _train(self, after_epoch: AfterEpoch, asked: Callable[[], bool]) -> None:
        bar = need("tqdm").tqdm(
            total=len(self._batches) * self.plan.epochs,
            initial=self.position.step,
            unit="step",
            disable=None if self.plan.progress and self.ranks.is_main else True,
        )
        with bar:
            while self.position.epoch < self.plan.epochs:
                self._train_epoch(bar, asked)
                losses = self._of_epoch.means(self.ranks)
                self._of_epoch.reset()
                self.position.epoch += 1
                self.position.step_in_epoch = 0
                found = {"loss": dict(zip(self._objective.tasks, losses)), **after_epoch(self.position.epoch, losses)}
                self._report("epoch", found)
                if self._due() or (self.position.epoch == self.plan.epochs and self.plan.checkpoint_steps):
                    self._save()
        if self._agreed(asked()):
            self._end_early()

    def _train_epoch(self, bar: Any, asked: Callable[[], bool]) -> None:
        steps = self._batches.steps(self.position.epoch)[self.position.step_in_epoch :]
        self._wrapped.train()
        loaded = self._load(self._source, [micro for step in steps for micro in step.own])
        for step in steps:
            # All of them first, and on the host: what a loss is divided by depends on all labels of the step.
            batches = [next(loaded) for _ in step.own]
            weights = [self._objective.weights(batch) for batch in batches]
            counts, stop = self._agree_on(step, weights, asked())
            if stop:
                self._end_early()
            self._take(step, batches, weights, counts)
            self.position.step += 1
            self.position.step_in_epoch += 1
            bar.update()
            if self.plan.log_steps and self.position.step % self.plan.log_steps == 0:
                self._log_interval()
            # With the last step of an epoch, the checkpoint waits for its evaluation.
            if self._due() and self.position.step_in_epoch < len(self._batches):
                self._save()

    def _take(self, step: Step, batches: list[Any], weights: list[Tensor | None], counts: Tensor) -> None:
        accelerator = self.accelerator
        self._inner_optimizer.zero_grad()  # whatever others have left there
        divisors = [self.ranks.size / count if count > 0 else 0.0 for count in counts.tolist()]
        for number, (loaded, own) in enumerate(zip(batches, weights)):
            batch = self._on_device(loaded)
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self._wrapped):
                losses = self._objective.losses(self._wrapped, batch)
                sums = weighted_sums(losses, own)
                self._of_epoch.add(sums)
                self._of_interval.add(sums)
                self._backward(
                    scaled(sums, divisors),
                    share=step.sizes[number] / step.size,
                    accumulate=not last,
                    accelerator=accelerator,
                    arguments=self._objective.regularizer_arguments(batch, losses),
                )
        self._of_epoch.count(counts)
        self._of_interval.count(counts)
        if self.plan.clip_norm is not None:
            self._gradient_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.plan.clip_norm)
        self._rates = self._scheduler.get_last_lr()
        skipped = False
        if accelerator.scaler is None:
            self._inner_optimizer.step()  # accelerate's own takes as long again for small models
        else:
            self._prepared_optimizer.step()
            skipped = self._prepared_optimizer.step_was_skipped
        if not skipped:
            self._scheduler.step()
        self._inner_optimizer.zero_grad()

    def _agree_on(self, step: Step, weights: list[Tensor | None], asked: bool) -> tuple[Tensor, bool]:
        """``[T]`` labels of the step in all processes, and whether any of them is to stop."""
        tasks = len(self._objective.tasks)
        if all(own is None for own in weights):
            return torch.full((tasks,), float(step.size), dtype=torch.float64), self._agreed(asked)
        table = torch.zeros(tasks + 1, dtype=torch.float64)
        for own in weights:
            if own is not None:
                table[:tasks] += own.detach().to("cpu", torch.float64).sum(1)
        table[tasks] = float(asked)
        self.ranks.total(table)
        return table[:tasks], bool(table[tasks] > 0)

    def _agreed(self, asked: bool) -> bool:
        return bool(self.ranks.total(torch.tensor([float(asked)])) > 0) if self.ranks.size > 1 else asked

    def _load(self, source: Source, wanted: Sequence[MicroBatch]) -> Iterator[Any]:
        if id(source) not in self._feeds:
            feed = Feed(
                source,
                self.plan.seed,
                workers=self.plan.data_workers,
                collate=self._collate,
                pin_memory=self.accelerator.device.type == "cuda",
            )
            self._feeds[id(source)] = source, feed
        return self._feeds[id(source)][1](wanted)

    def _on_device(self, batch: Any) -> Any:
        device = self.accelerator.device
        if device.type == "cpu":
            return batch
        return need("accelerate.utils").send_to_device(batch, device, non_blocking=True)

    # What is written.

    def _report(self, event: str, values: Mapping[str, Any]) -> None:
        self._log.write(event, {"epoch": self.position.epoch, "step": self.position.step, **values})
        if self.accelerator.trackers:
            self.accelerator.log(_flat(event, values), step=self.position.step)
            for part in self._backward.attached.values():
                if part.report is not None:
                    log_report(part, self.accelerator, self.position.step)

    def _log_interval(self) -> None:
        losses = self._of_interval.means(self.ranks)
        self._of_interval.reset()
        values: dict[str, Any] = {"loss": dict(zip(self._objective.tasks, losses))}
        values["learning_rate"] = self._rates
        if self._gradient_norm is not None:
            values["gradient_norm"] = float(self._gradient_norm)
        if (regularizer := self._backward.regularizer) is not None and regularizer.report is not None:
            values["penalty"] = float(regularizer.report.penalty)
        self._report("step", values)

    def _open_trackers(self) -> None:
        if self._tracked is None:
            return
        name, options = self._tracked
        # What a killed run has logged behind the checkpoint is taken out of the charts.
        purge = {"tensorboard": {"purge_step": self.position.step + 1}} if self._resumed else {}
        self.accelerator.init_trackers(name, dict(options), init_kwargs=purge)

    def _due(self) -> bool:
        return self.plan.checkpoint_steps > 0 and self.position.step % self.plan.checkpoint_steps == 0

    def _save(self) -> None:
        if self._saved is not None:
            self._saved.save()

    def _end_early(self) -> None:
        if self._saved is not None and self._saved.save():
            folder = self._saved.checkpoints.folder
            where = f" after step {self.position.step}, with a checkpoint in {folder}. Use --resume auto to go on"
        else:
            where = f" after step {self.position.step}, without a checkpoint"
        raise Terminated(f"Terminated{where}.")


def _identity(
    plan: Plan, objective: Objective, source: Source, optimizer: torch.optim.Optimizer, precision: str
) -> dict[str, Any]:
    """What has to be the same in a resumed training; micro-batches, processes and data workers may be others."""
    groups = optimizer.param_groups
    identity: dict[str, Any] = {
        "tasks": list(objective.tasks),
        "seed": plan.seed,
        "batch_size": plan.batch_size,
        "samples": len(source),
        "clip_norm": plan.clip_norm,
        "warmup_steps": plan.warmup_steps,
        "decay": plan.decay,
        "mixed precision": precision,
        "dtype": str(groups[0]["params"][0].dtype),
        "learning rates": [float(group.get("initial_lr", group["lr"])) for group in groups],
        "weight decays": [float(group.get("weight_decay", 0.0)) for group in groups],
    }
    if plan.decay != "constant":  # otherwise a training may be made longer
        identity["epochs"] = plan.epochs
    return identity


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_flat(f"{prefix}/{name}", value))
        elif isinstance(value, (list, tuple)):
            found.update(_flat(f"{prefix}/{name}", {str(index): own for index, own in enumerate(value)}))
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[f"{prefix}/{name}"] = value
    return found
