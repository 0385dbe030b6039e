"""One training of one method on many tasks, with the best weights by validation."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.sources import Collate, Source
from ..data.task_kinds import TaskKind, columns_of
from ..methods.attach import attach
from ..methods.conflicts import ConflictWatch
from ..methods.growth import RelationPhase, permutation_seed
from ..methods.methods import BASELINE, GROUPS_APART, MERGED, METHODS, Method
from ..methods.reshaping import first_phase
from ..runtime.errors import OptionError
from ..runtime.processes import Ranks, open_accelerator
from .batches import Feed, MicroBatch
from .engine import Engine
from .frozen_features import FrozenFeatures
from .merged_models import best_merged
from .metrics import mean_of_known, selection_score, task_scores
from .objective import MultiTaskObjective
from .optimizers import MakeOptimizer, adamw
from .options import Options
from .outcome import Outcome
from .progress import Progress
from .relation_watch import RelationWatch

#: Folder of the checkpoints of hard sharing before a method sets in, within that of a training.
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


def train(
    build: Callable[[], nn.Module],
    data: Data,
    method: Method,
    value: float | str,
    options: Options,
    *,
    folder: Path | None = None,
    resume: str | Path = "never",
    make_optimizer: MakeOptimizer = adamw,
    tracked: tuple[str, Mapping[str, Any]] | None = None,
) -> Outcome:
    """Train, go back to the best weights by validation, and measure them on the test split if there is one.

    The same seed means the same initial weights, batches and random transforms for every method. With several processes,
    all of them have to call this; each gets the result. Where a method changes the model on the way, the best weights are
    those after its last change. Groups that are trained apart have the epochs that are left when they are known.

    Args:
        build: the model, whose ``forward`` returns ``{task: outputs}``, with a ``backbone`` and ``heads``; or with
            ``parts()``: modules that share no parameter, each with its tasks, which have best weights of their own.
        data: of the tasks.
        method: what is added to the plain step.
        value: of the hyper-parameter: the weight decay without a penalty, or else its strength or share; words for a method
            that is not tuned.
        options: of the steps.
        folder: of the log, checkpoints and trackers.
        resume: ``"auto"``: from the newest checkpoint of the folder.
        make_optimizer: from the model, a learning rate and a weight decay.
        tracked: name and options for trackers.

    Raises:
        Terminated: SIGTERM came; a checkpoint was written.
        RecipeError: options, data or checkpoints that cannot work.
    """
    accelerator = open_accelerator(options.mixed_precision, trackers=options.trackers, folder=folder)

    def new() -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)  # and not those of GPUs, which would stay so
            return build()

    model = new()
    if not method.shared and not hasattr(model, "parts"):
        raise OptionError(
            f"{method.key} needs a network for each task, and the model {type(model).__name__} is one for all of them. "
            "Choose another method, or a model with parts()."
        )
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    apart = method.architecture == GROUPS_APART
    before = options.epochs if method.frozen else options.pretraining_epochs
    if apart and before:
        raise OptionError(f"{method.key} begins with new networks. Leave pretraining_epochs={before} out.")
    if before := first_phase(options.epochs) if apart else before:
        own = None if folder is None else folder / PRETRAINING
        # Its own: an accelerator remembers every optimizer, and would unscale their gradients twice.
        another = open_accelerator(options.mixed_precision, folder=own)
        base = dataclasses.replace(options, epochs=before)
        known = dataclasses.replace(data, test=None)
        first = (method, value) if apart else (METHODS[BASELINE], options.weight_decay)
        training = _Training(model, known, *first, base, another, own, make_optimizer, None)
        training.run(resume if resume in ("auto", "never") else "auto")
        if method.frozen:
            features = FrozenFeatures(model.backbone, training.training_inputs())
            model = new()
            model.backbone = features
        if apart:
            model = new()
            model.part(training.groups)
            # In all as many epochs as the others.
            options = dataclasses.replace(options, epochs=options.epochs - before)
            method = dataclasses.replace(method, view=None)
    training = _Training(model, data, method, value, options, accelerator, folder, make_optimizer, tracked)
    return training.run(resume, initial=new().backbones[0].state_dict() if method.architecture == MERGED else None)


class _Training:
    """The parts of one training, put together."""

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        method: Method,
        value: float | str,
        options: Options,
        accelerator: Any,
        folder: Path | None,
        make_optimizer: MakeOptimizer,
        tracked: tuple[str, Mapping[str, Any]] | None,
    ) -> None:
        self._data = data
        self._options = options
        self._ranks = Ranks(accelerator)
        self._watch = (
            ConflictWatch(model) if options.watch_conflicts and method.shared and data.test is not None else None
        )
        decay = options.weight_decay if isinstance(value, str) or method.penalty is not None else value
        shares = method.rule is not None and (options.penalty == "share" or not method.tuned)
        optimizer = make_optimizer(model, options.learning_rate, decay)
        self._backward = attach(
            method,
            model,
            tuple(data.kinds),
            optimizer,
            strength=0.0 if isinstance(value, str) or method.penalty is None or shares else value,
            share=value if shares else None,
            batch_size=options.batch_size,
            seed=options.seed,
            temperature=options.temperature,
            channel_axis=getattr(model, "channel_axis", None),
            process_group=self._ranks.group,
            kinds=data.kinds,
            epochs=options.epochs,
            steps_per_epoch=-(-len(data.train) // options.batch_size),
        )
        self._permuted = permutation_seed(options.seed) if method.permuted else None
        self.groups: tuple[tuple[str, ...], ...] = ()
        if self._backward.needs_whole_steps and (options.accumulation > 1 or self._ranks.size > 1):
            raise OptionError(
                f"{method.key} weighs the losses of whole steps, and this training has {options.accumulation} "
                f"micro-batch(es) in a step and {self._ranks.size} process(es). Use one of each, or another method."
            )
        regularizer = self._backward.regularizer
        self._relations: RelationWatch | None = None
        if options.watch_relations and regularizer is not None:
            self._relations = RelationWatch(regularizer, data.kinds)
        self._objective = MultiTaskObjective(
            data.kinds,
            apart=self._backward.averages_itself,
            of_losses=method.saliency.get("target") == "loss",
            watch=None if self._relations is None else self._relations.take,
        )
        self._progress = Progress(model, tuple(data.kinds))
        self._engine = Engine(
            accelerator,
            model,
            optimizer,
            self._backward,
            self._objective,
            data.train,
            options,
            collate=data.collate,
            folder=folder,
            stateful={
                "progress": self._progress,
                **({} if self._relations is None else {"relations": self._relations}),
            },
            tracked=tracked,
        )

    def run(self, resume: str | Path, initial: Mapping[str, Tensor] | None = None) -> Outcome:
        """Train; with ``initial`` weights of the backbones of single-task models, merge them."""
        self._engine.run(self._after_epoch, resume)
        if type(self._backward.reshaping) is RelationPhase:
            self.groups = self._backward.reshaping.groups(self._permuted)
        progress, data = self._progress, self._data
        progress.best.restore()
        score, loss = progress.means()
        if initial is not None:
            single_tasks: Any = self._engine.model
            self._engine.model, (score, loss) = best_merged(single_tasks, initial, self._validate)
        scores: dict[str, dict[str, float]] = {}
        outputs: dict[str, Tensor] = {}
        validation_outputs: dict[str, Tensor] = {}
        if data.test is not None:
            validation_outputs = self._engine.evaluate(data.validation)
            outputs = self._engine.evaluate(data.test)
            scores = self._scores(outputs)
        costs: dict[str, float] = {}
        if self._options.measure_costs:
            engine = self._engine
            costs = {"seconds_per_step": engine.seconds_per_step, "peak_memory": engine.peak_memory()}
        views = None
        if self._relations is not None:
            views = self._relations.views
            self._relations.remove()
        self._backward.remove()  # whoever gets the model attaches what they like
        return Outcome(
            self._engine.model,
            progress.epochs_of_tasks(),
            score,
            loss,
            scores,
            progress.curves,
            progress.relations,
            outputs,
            validation_outputs,
            costs=costs,
            views=views,
        )

    def _validate(self, model: nn.Module) -> tuple[float, float]:
        """Score and loss of a model on the validation split."""
        self._engine.model = model
        found = self._engine.evaluate(self._data.validation)
        losses = self._objective.mean_losses(found["outputs"], found["labels"])
        return selection_score(self._scores(found), self._data.kinds), mean_of_known(list(losses.values()))

    def training_inputs(self) -> Iterator[Any]:
        """Batches of the inputs of all training samples, in their order."""
        source, size = self._data.train, self._options.evaluation_batch_size or len(self._data.train)
        wanted = [MicroBatch(-1, range(len(source))[first : first + size]) for first in range(0, len(source), size)]
        for inputs, _ in Feed(source, self._options.seed, collate=self._data.collate)(wanted):
            yield self._engine.on_device(inputs)

    def _after_epoch(self, epoch: int, training_losses: Sequence[float]) -> dict[str, float]:
        figures = self._looked_at(epoch, training_losses)
        reshaping = self._backward.reshaping
        if reshaping is not None and reshaping.after_epoch(epoch):
            self._engine.model_changed()
            self._progress.begin_again()
        return figures

    def _looked_at(self, epoch: int, training_losses: Sequence[float]) -> dict[str, float]:
        options, data = self._options, self._data
        if epoch % max(1, options.epochs // options.evaluations) and epoch != options.epochs:
            return {}
        found = self._engine.evaluate(data.validation)
        scores = self._scores(found)
        losses = self._objective.mean_losses(found["outputs"], found["labels"])
        figures = {
            "training_loss": mean_of_known(training_losses),
            "validation_loss": mean_of_known(list(losses.values())),
            "validation_score": selection_score(scores, data.kinds),
        }
        if self._relations is not None:
            self._relations.after_look(figures["validation_loss"])
        regularizer = self._backward.regularizer
        if regularizer is not None and regularizer.report is not None:
            share = regularizer.report.share
            figures["penalty_share"] = math.nan if share is None else float(share)
        surgery = self._backward.at_feature if regularizer is None else regularizer.surgery
        if self._watch is not None:
            figures["conflicts"] = self._watch.measure(*_everything(data.train))
        elif surgery is not None and surgery.report is not None:
            figures["conflicts"] = float(surgery.report.conflicts)
        of_parts = [
            (
                selection_score({task: scores[task] for task in tasks}, data.kinds),
                -mean_of_known([losses[task] for task in tasks]),
            )
            for tasks in self._progress.tasks_of_parts
        ]
        self._progress.update({"epoch": float(epoch), **figures}, of_parts, self._backward)
        return figures

    def _scores(self, found: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        # Of each part on its own: one that diverged takes the scores of its own tasks, and of no others.
        kinds = self._data.kinds
        scores: dict[str, dict[str, float]] = {}
        columns = dict(zip(kinds, columns_of(kinds)))
        for tasks in self._progress.tasks_of_parts:
            outputs = torch.cat([found["outputs"][:, columns[task]] for task in tasks], dim=1)
            labels = found["labels"][:, [list(kinds).index(task) for task in tasks]]
            scores.update(task_scores(outputs, labels, {task: kinds[task] for task in tasks}))
        return {task: scores[task] for task in kinds}


def _everything(source: Any) -> tuple[Tensor, Tensor]:
    inputs, labels = source.rows_as_batch(range(len(source)))
    return inputs, labels
