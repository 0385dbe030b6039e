"""The one training loop of all recipes: the same steps for any number of processes and micro-batches, and after a kill."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saliency_reg.integrations.accelerate import register

from ..data.sources import Collate, Source
from ..methods.backward import Backward
from ..runtime.errors import OptionError, need
from ..runtime.log import RunLog
from ..runtime.processes import Ranks
from ..runtime.random_state import derived_seed, kept_random_state, seed_all
from ..runtime.termination import Terminated, deferred
from .batches import Feed, GlobalBatches, MicroBatch, Step
from .checkpoints import Checkpoints
from .costs import clock, live_bytes
from .learning_rate import learning_rate_factor
from .loss_sums import LossSums, scaled, weighted_sums
from .objective import Objective
from .options import Options
from .reports import Reports
from .resume import Position, SavedTraining, Stateful, identity_of

LOG = "log.jsonl"

#: Called after each epoch, which has been counted, with the mean loss of each task in it; returns what is to be logged. Of
#: that, ``validation_score`` or ``validation_auc``, ``penalty_share`` and ``training_loss`` are told to whoever watches.
AfterEpoch = Callable[[int, list[float]], Mapping[str, Any]]


@dataclass(eq=False)
class Engine:
    """Trains one model.

    With the same seed a step is the same, up to rounding, for any number of processes and micro-batches (but surgery at the
    feature map weighs each micro-batch on its own, and dropout draws on each process for itself), and to the bit for any
    number of data workers, and after a resume.

    Attributes:
        accelerator: of :func:`open_accelerator`; one for each engine.
        model: not yet wrapped; is moved to the device.
        source: the training data.
        collate: samples to a batch, for all data; PyTorch's by default.
        folder: of the log, checkpoints and trackers; none of them without one.
        stateful: what else belongs into checkpoints, under names.
        tracked: name and options of the run for the trackers of the accelerator.

    Raises:
        OptionError: options that do not go together, or no data.
    """

    accelerator: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    backward: Backward
    objective: Objective
    source: Source
    options: Options
    _: KW_ONLY
    collate: Collate | None = None
    folder: Path | None = None
    stateful: Mapping[str, Stateful] | None = None
    tracked: tuple[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        accelerator, model, options, backward = self.accelerator, self.model, self.options, self.backward
        if len(self.source) == 0:
            raise OptionError("there are no training samples. Choose other data.")
        self.ranks = ranks = Ranks(accelerator)
        self.position = Position()
        self._seconds, self._steps = 0.0, 0
        self._feeds: dict[int, tuple[Source, Feed]] = {}
        self._running = False
        self._batches = GlobalBatches(
            len(self.source), options.batch_size, options.seed, options.accumulation, ranks=ranks.size, rank=ranks.rank
        )
        steps = len(self._batches) * options.epochs
        # Unwrapped by accelerate, which would step it once for each process.
        factor = learning_rate_factor(options.decay, options.warmup_steps, steps)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        # Gradients that the surgery averages must not be averaged again.
        self._wrapped: nn.Module = accelerator.prepare_model(model, evaluation_mode=backward.averages_itself)
        if backward.averages_itself:
            ranks.same_weights([*model.parameters(), *model.buffers()])
        self._prepared_optimizer = accelerator.prepare_optimizer(self.optimizer)
        for part in backward.attached.values():
            register(part, accelerator)
        tasks = self.objective.tasks
        self._sums = {name: LossSums(tasks, accelerator.device) for name in ("epoch", "interval")}
        log = RunLog(self.folder / LOG if self.folder is not None and ranks.is_main else None)
        watched = options.progress and ranks.is_main
        self._reports = Reports(accelerator, log, backward, tasks, self.position, options.epochs, steps, watched)
        states = {"optimizer": self.optimizer, "scheduler": self._scheduler, "scaler": accelerator.scaler}
        self._saved: SavedTraining | None = None
        if self.folder is not None:
            self._saved = SavedTraining(
                Checkpoints(self.folder, options.keep_checkpoints),
                ranks,
                accelerator.device,
                log,
                identity=identity_of(self.objective.tasks, options, len(self.source), accelerator, self.optimizer),
                seed=options.seed,
                position=self.position,
                model=model,
                backward=backward,
                states={name: part for name, part in states.items() if part is not None},
                others=dict(self.stateful or {}),
                sums=self._sums,
            )

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
        with kept_random_state(self.accelerator.device), deferred() as asked:
            seed_all(derived_seed("training", self.options.seed, self.ranks.rank))
            if self._saved is not None:
                self._saved.resume(resume)
                self.model_changed()
            elif resume not in ("never", "auto"):
                raise OptionError(f"found resume={str(resume)!r} without a folder. Pass the folder of the training.")
            with self._reports.opened(self.tracked, resumed=resume != "never"):
                self._running = True
                try:
                    self._train(after_epoch, asked)
                finally:
                    self._running = False
                    self._close_feeds()

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
        self.ranks.same_weights(list(self.model.buffers()))  # statistics of normalisations are each process' own
        own = np.array_split(range(len(source)), self.ranks.size)[self.ranks.rank].tolist()
        at_once = self.options.evaluation_batch_size or max(len(own), 1)
        wanted = [MicroBatch(-1, own[first : first + at_once]) for first in range(0, len(own), at_once)]
        # A process without samples predicts one for the format, and drops it.
        parts = [
            self.objective.predictions(self.model, self.on_device(batch))
            for batch in self._load(source, wanted or [MicroBatch(-1, [0])])
        ]
        if not self._running:  # in a run, data workers stay for the next epoch
            self._close_feeds()
        joined = {name: torch.cat([part[name] for part in parts])[: len(own)] for name in parts[0]}
        return {name: self.ranks.rows_of_all(rows) for name, rows in joined.items()}

    @property
    def seconds_per_step(self) -> float:
        """Of the steps taken here: of the processor, or of the clock where there is a GPU; NaN without any."""
        return self._seconds / self._steps if self._steps else math.nan

    def peak_memory(self) -> int:
        """The most bytes that tensors have at a time in a further step, which is taken back; only after the training.

        Parameters, gradients, the state of the optimizer, what waits for the backward pass, and what is computed meanwhile,
        of this process. The same for each run on a CPU.
        """
        device, step = self.accelerator.device, self._batches.steps(0)[0]
        before = {name: value.to("cpu", copy=True) for name, value in self.model.state_dict().items()}
        with kept_random_state(device):
            self._wrapped.train()
            batches = list(self._load(self.source, list(step.own)))
            weights = [self.objective.weights(batch) for batch in batches]
            counts, _ = self._agree_on(step, weights, False)
            states = [value for own in self.optimizer.state.values() for value in own.values()]
            with live_bytes(device, [*self.model.parameters(), *self.model.buffers(), *states]) as bytes_of:
                self._take(step, batches, weights, counts)
            self._close_feeds()
        self.model.load_state_dict(before)
        return bytes_of.peak

    def model_changed(self) -> None:
        """Take up that the method may have given the model other parameters, between two epochs."""
        if (
            self.backward.reshaping is not None and self._wrapped is not self.model
        ):  # the wrapper knows those that it was built with
            self._wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=self.backward.averages_itself)

    def remove_checkpoints(self) -> None:
        """For a training whose result is kept elsewhere."""
        if self._saved is not None and self.ranks.is_main:
            self._saved.checkpoints.remove_all()

    def _train(self, after_epoch: AfterEpoch, asked: Callable[[], bool]) -> None:
        position = self.position
        while position.epoch < self.options.epochs:
            self._train_epoch(asked)
            self.backward.after_epoch()
            losses = self._sums["epoch"].take_means(self.ranks)
            position.epoch += 1
            self._reports.epoch(losses, after_epoch(position.epoch, losses))
            self._save_if_due()
        if self.ranks.total(torch.tensor(float(asked()))) > 0:
            self._end_early()

    def _train_epoch(self, asked: Callable[[], bool]) -> None:
        position = self.position
        per_epoch = len(self._batches)
        steps = self._batches.steps(position.epoch)[position.step % per_epoch :]
        self._wrapped.train()
        started = clock(self.accelerator.device)
        loaded = self._load(self.source, [micro for step in steps for micro in step.own])
        for step in steps:
            # All of them first, and on the host: what a loss is divided by depends on all labels of the step.
            batches = [next(loaded) for _ in step.own]
            weights = [self.objective.weights(batch) for batch in batches]
            counts, stop = self._agree_on(step, weights, asked())
            if stop:
                self._end_early()
            rates = self._scheduler.get_last_lr()
            gradient_norm = self._take(step, batches, weights, counts)
            position.step += 1
            self._steps += 1
            self._reports.step()
            if self.options.log_steps and position.step % self.options.log_steps == 0:
                losses = self._sums["interval"].take_means(self.ranks)
                self._reports.interval(losses, rates, gradient_norm)
            # With the last step of an epoch, the checkpoint waits for its evaluation.
            if position.step % per_epoch:
                self._save_if_due()
        self._seconds += clock(self.accelerator.device) - started

    def _take(self, step: Step, batches: list[Any], weights: list[Tensor | None], counts: Tensor) -> Tensor | None:
        """Take an optimizer step, and return the norm of the gradients before clipping, where they are clipped."""
        accelerator = self.accelerator
        self.optimizer.zero_grad()  # whatever others have left there
        divisors = [self.ranks.size / count if count > 0 else 0.0 for count in counts.tolist()]
        for number, (loaded, own) in enumerate(zip(batches, weights)):
            batch = self.on_device(loaded)
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self._wrapped):
                losses = self.objective.losses(self._wrapped, batch)
                self.objective.after_forward(batch)
                sums = weighted_sums(losses, own)
                for kept in self._sums.values():
                    kept.add(sums)
                self.backward(
                    scaled(sums, divisors),
                    share=step.sizes[number] / step.size,
                    accumulate=not last,
                    accelerator=accelerator,
                    arguments=self.objective.regularizer_arguments(batch, losses),
                    samples=(losses, own),
                    known=counts > 0,
                    labels=self.objective.labels(batch) if self.backward.observes else None,
                )
        for kept in self._sums.values():
            kept.count(counts)
        norm: Tensor | None = None
        if self.options.clip_norm is not None:
            norm = accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        # Accelerate's own takes as long again for small models.
        (self.optimizer if accelerator.scaler is None else self._prepared_optimizer).step()
        if not self._prepared_optimizer.step_was_skipped:
            self._scheduler.step()
        self.optimizer.zero_grad()
        if self.backward.learns_from_steps:  # of whole steps
            with torch.no_grad():
                losses = self.objective.losses(self._wrapped, self.on_device(batches[0]))
                self.backward.after_step(scaled(weighted_sums(losses, weights[0]), divisors))
        return norm

    def _agree_on(self, step: Step, weights: list[Tensor | None], asked: bool) -> tuple[Tensor, bool]:
        """``[T]`` labels of the step in all processes, and whether any of them is to stop."""
        table = torch.zeros(len(self.objective.tasks) + 1, dtype=torch.float64)
        for micro, own in zip(step.own, weights):
            table[:-1] += len(micro.indices) if own is None else own.detach().to("cpu", torch.float64).sum(1)
        table[-1] = float(asked)
        self.ranks.total(table)
        return table[:-1], bool(table[-1] > 0)

    def _load(self, source: Source, wanted: Sequence[MicroBatch]) -> Iterator[Any]:
        if id(source) not in self._feeds:
            feed = Feed(
                source,
                self.options.seed,
                workers=self.options.data_workers,
                collate=self.collate,
                pin_memory=self.accelerator.device.type == "cuda",
            )
            self._feeds[id(source)] = source, feed
        return self._feeds[id(source)][1](wanted)

    def _close_feeds(self) -> None:
        for _, feed in self._feeds.values():
            feed.close()
        self._feeds.clear()

    def on_device(self, batch: Any) -> Any:
        """The same tensors where the model is."""
        device = self.accelerator.device
        if device.type == "cpu":
            return batch
        return need("accelerate.utils").send_to_device(batch, device, non_blocking=True)

    def _save_if_due(self) -> None:
        position, every = self.position, self.options.checkpoint_steps
        if self._saved is not None and every and (position.step % every == 0 or position.epoch == self.options.epochs):
            self._saved.save()

    def _end_early(self) -> None:
        where = f"after step {self.position.step}, without a checkpoint"
        if self._saved is not None and self._saved.save():
            folder = self._saved.checkpoints.folder
            where = f"after step {self.position.step}, with a checkpoint in {folder}. Use --resume auto to go on"
        raise Terminated(f"Terminated {where}.")
