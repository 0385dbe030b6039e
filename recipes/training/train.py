"""One training of one method on many tasks, with the best weights by validation."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.sources import Collate, Source
from ..data.task_kinds import TaskKind
from ..methods.attach import Backward
from ..methods.methods import Method, backward_of
from ..runtime.errors import OptionError
from ..runtime.processes import Ranks, open_accelerator
from .best_weights import BestEpochs
from .engine import Engine, Plan
from .metrics import macro, score_of, task_scores
from .multi_task_objective import MultiTaskObjective

__all__ = ["PRETRAINING", "Data", "Options", "Outcome", "train_tasks"]


#: Folder of its checkpoints, within that of a training.
PRETRAINING = "pretraining"


@dataclass(frozen=True)
class Data:
    """Samples ``(input, labels [T])`` of the same tasks, NaN for missing labels, in three disjoint splits."""

    kinds: Mapping[str, TaskKind]
    train: Source
    validation: Source
    test: Source | None
    """``None`` for trials, which must not see it."""
    collate: Collate | None = None


@dataclass(frozen=True)
class Options:
    """What is the same for all methods of a comparison.

    Attributes:
        epochs, batch_size, learning_rate, weight_decay, decay, warmup_steps, clip_norm, accumulation: of AdamW's steps.
        evaluations: the validation split is looked at after every ``epochs // evaluations`` epochs (at least one), and after
            the last one; the best weights are kept.
        pretraining_epochs: of hard sharing before the method sets in, with an optimizer of its own, as the authors do.
        temperature: of the ``entropic`` rule.
        mixed_precision, data_workers, checkpoint_steps, evaluation_batch_size, progress, trackers: of the engine.
        channels_last: memory format of convolutions; quicker on most machines, equal up to rounding.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.05
    decay: str = "cosine"
    warmup_steps: int = 0
    clip_norm: float | None = None
    accumulation: int = 1
    evaluations: int = 10
    pretraining_epochs: int = 0
    temperature: float | None = None
    mixed_precision: str = "no"
    data_workers: int = 0
    checkpoint_steps: int = 0
    evaluation_batch_size: int | None = 500
    log_steps: int = 0
    progress: bool = False
    trackers: tuple[str, ...] = ()
    channels_last: bool = False


@dataclass
class Outcome:
    """What a training left, as plain numbers beside the model.

    Attributes:
        model: with the best weights by validation.
        best_epoch: when it had them.
        validation: what it was chosen by: the mean over the tasks of AUC, accuracy, or one minus the nMSE.
        scores: on the test split, of each task; empty without one.
        curves: one value for each look at the validation split.
        relations: ``[T, T]``, of the best epoch, if the method has any.
        outputs, validation_outputs: logits ``"outputs"`` and ``"labels"``, if the test split was looked at.
    """

    model: nn.Module
    best_epoch: int
    validation: float
    scores: dict[str, dict[str, float]]
    curves: dict[str, list[float]]
    relations: list[list[float]] | None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    validation_outputs: dict[str, Tensor] = field(default_factory=dict)

    @property
    def macro(self) -> dict[str, float]:
        """Means over the tasks."""
        return macro(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """What goes into a file."""
        return {
            "best_epoch": self.best_epoch,
            "validation": self.validation,
            "macro": self.macro,
            "scores": self.scores,
            "curves": self.curves,
            "relations": self.relations,
        }


#: From a model to an optimizer, from a learning rate and a weight decay.
MakeOptimizer = Callable[[nn.Module, float, float], torch.optim.Optimizer]


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW on all parameters alike."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, foreach=True)


def train_tasks(
    build: Callable[[], nn.Module],
    data: Data,
    method: Method,
    value: float,
    options: Options,
    seed: int,
    *,
    folder: Path | None = None,
    resume: str | Path = "never",
    make_optimizer: MakeOptimizer = adamw,
    tracked: tuple[str, Mapping[str, Any]] | None = None,
) -> Outcome:
    """Train, go back to the best weights by validation, and measure them on the test split if there is one.

    The same seed means the same initial weights, batches and random transforms for every method.

    Args:
        build: the model, whose ``forward`` returns ``{task: outputs}``, with a ``backbone`` and ``heads``.
        data: of the tasks.
        method: what is added to the plain step.
        value: of the method's hyper-parameter: the weight decay without a penalty, or else its strength.
        options: of the steps.
        seed: of everything that is drawn.
        folder: of the log, checkpoints and trackers.
        resume: ``"auto"``: from the newest checkpoint of the folder.
        make_optimizer: from the model, a learning rate and a weight decay.
        tracked: name and options for trackers.

    Raises:
        Terminated: SIGTERM came; a checkpoint was written.
        RecipeError: options, data or checkpoints that cannot work.
    """
    if options.evaluations < 1:
        raise OptionError(f"found {options.evaluations} evaluations. Use 1 or more.")
    accelerator = open_accelerator(options.mixed_precision, trackers=options.trackers, folder=folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # and not those of GPUs, which would stay so
        model = build()
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if options.pretraining_epochs:
        _pretrain(model, data, options, seed, folder, resume, make_optimizer)
    training = _Training(
        model, data, method, value, options, seed, accelerator, folder, make_optimizer, tracked, options.epochs
    )
    return training.run(resume)


def _pretrain(
    model: nn.Module,
    data: Data,
    options: Options,
    seed: int,
    folder: Path | None,
    resume: str | Path,
    make_optimizer: MakeOptimizer,
) -> None:
    """The base of all methods: hard sharing, of which the best weights by validation stay in the model."""
    from ..methods.methods import BASELINE, METHODS

    own = None if folder is None else folder / PRETRAINING
    # Its own: an accelerator remembers every optimizer, and would unscale their gradients twice.
    accelerator = open_accelerator(options.mixed_precision, folder=own)
    training = _Training(
        model,
        data,
        METHODS[BASELINE],
        options.weight_decay,
        options,
        seed,
        accelerator,
        own,
        make_optimizer,
        None,
        options.pretraining_epochs,
    )
    training.run(resume if resume in ("auto", "never") else "auto", test=False)


class _Training:
    """The parts of one training, put together."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        method: Method,
        value: float,
        options: Options,
        seed: int,
        accelerator: Any,
        folder: Path | None,
        make_optimizer: MakeOptimizer,
        tracked: tuple[str, Mapping[str, Any]] | None,
        epochs: int,
    ) -> None:
        self._data = data
        self._epochs = epochs
        self._every = max(1, epochs // options.evaluations)
        decay, strength = (value, 0.0) if method.rule is None else (options.weight_decay, value)
        optimizer = make_optimizer(model, options.learning_rate, decay)
        self._backward = backward_of(
            method,
            model,
            tuple(data.kinds),
            optimizer,
            strength=strength,
            batch_size=options.batch_size,
            seed=seed,
            temperature=options.temperature,
            channel_axis=getattr(model, "channel_axis", None),
            process_group=Ranks(accelerator).group,
        )
        self._progress = _Progress(model)
        self._engine = Engine(
            accelerator,
            model,
            optimizer,
            self._backward,
            MultiTaskObjective(data.kinds, apart=self._backward.averages_itself),
            data.train,
            Plan(
                epochs=epochs,
                batch_size=options.batch_size,
                seed=seed,
                accumulation=options.accumulation,
                clip_norm=options.clip_norm,
                warmup_steps=options.warmup_steps,
                decay=options.decay,
                data_workers=options.data_workers,
                evaluation_batch_size=options.evaluation_batch_size,
                log_steps=options.log_steps,
                checkpoint_steps=options.checkpoint_steps,
                progress=options.progress,
            ),
            collate=data.collate,
            folder=folder,
            stateful={"progress": self._progress},
            tracked=tracked,
        )

    def run(self, resume: str | Path, test: bool = True) -> Outcome:
        self._engine.run(self._after_epoch, resume)
        progress = self._progress
        progress.best.restore()
        scores: dict[str, dict[str, float]] = {}
        outputs: dict[str, Tensor] = {}
        validation_outputs: dict[str, Tensor] = {}
        if test and self._data.test is not None:
            validation_outputs = self._engine.evaluate(self._data.validation)
            outputs = self._engine.evaluate(self._data.test)
            scores = task_scores(outputs["outputs"], outputs["labels"], self._data.kinds)
        for part in self._backward.attached.values():
            part.remove()  # whoever gets the model attaches what they like
        return Outcome(
            self._engine.model,
            progress.best.epochs[0],
            progress.best.scores[0][0],
            scores,
            progress.curves,
            progress.relations,
            outputs,
            validation_outputs,
        )

    def _after_epoch(self, epoch: int, training_losses: Sequence[float]) -> dict[str, float]:
        if epoch % self._every and epoch != self._epochs:
            return {}
        found = self._engine.evaluate(self._data.validation)
        score = score_of(found["outputs"], found["labels"], self._data.kinds)
        known = [loss for loss in training_losses if not math.isnan(loss)]
        figures = {
            "epoch": float(epoch),
            "training_loss": sum(known) / len(known) if known else math.nan,
            "validation_score": score,
        }
        regularizer = self._backward.regularizer
        if regularizer is not None and regularizer.report is not None:
            share = regularizer.report.share
            figures["penalty_share"] = math.nan if share is None else float(share)
        surgery = self._backward.at_feature if regularizer is None else regularizer.surgery
        if surgery is not None and surgery.report is not None:
            figures["conflicts"] = float(surgery.report.conflicts)
        self._progress.update(epoch, figures, score, self._backward)
        return {name: value for name, value in figures.items() if name != "epoch"}


class _Progress:
    """The curves so far, and the best weights."""

    def __init__(self, model: nn.Module) -> None:
        self.best = BestEpochs([model], (-math.inf,))
        self.curves: dict[str, list[float]] = {}
        self.relations: list[list[float]] | None = None

    def update(self, epoch: int, figures: Mapping[str, float], score: float, backward: Backward) -> None:
        for name, value in figures.items():
            self.curves.setdefault(name, []).append(value)
        if self.best.update(epoch, [(score,)]) or self.relations is None:
            self.relations = backward.relations

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best.state_dict(), "curves": self.curves, "relations": self.relations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best.load_state_dict(state["best"])
        self.curves = {name: list(curve) for name, curve in state["curves"].items()}
        self.relations = state["relations"]
