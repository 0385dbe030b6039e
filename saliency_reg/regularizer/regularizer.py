"""The penalty as a module that is attached to a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.feature_capture import FeatureCapture, FeatureChoice
from ..capture.forward import Captured
from ..capture.heads import HeadsChoice, check_task_names, resolve_heads
from ..capture.lookup import first_few
from ..capture.nested import Item
from ..distributed.joined_batch import Brought, Joined, JoinedBatch
from ..distributed.ranks import Ranks
from ..errors import (
    CaptureError,
    ConfigurationError,
    MissingArgumentError,
    NoHeadRanError,
    NonFiniteError,
    WrongTypeError,
)
from ..relations.pending_distances import PendingDistances
from ..relations.weights import RelationWeights, non_negative_number, relations_for
from ..report import SaliencyReport
from ..saliency.distances import BOUNDED_METRICS, check_metric, check_reduction, pairwise_distances
from ..saliency.extraction import Evaluated, Losses, SaliencyEvaluator, captured_by_hand, sum_of_losses
from ..saliency.scalars import ScalarizeChoice
from ..surgery.feature.combiner import ForkSurgery, checked_level
from ..surgery.feature.penalty_bypass import kept_out_of_surgery
from ..surgery.feature.taking_part import taking_part
from ..torch_tools.attachment import Removable
from ..torch_tools.hooks import StepHook, check_not_closure_only, unwrap_optimizer
from ..torch_tools.state import StateModule
from .first_call import FirstCall
from .options import check_state, settings
from .reach import NO_REACH, REACH, HeadForm, form_of_heads, reaches_backbone
from .reminders import Reminders
from .strength import StrengthSchedule
from .task_sample import TaskSampler

__all__ = ["SaliencyRegularizer"]

logger = logging.getLogger("saliency_reg")


class SaliencyRegularizer(StateModule, Removable):
    r"""Penalty on the distance between the saliencies of related tasks, for any multi-head model.

    ``regularizer()`` after a forward returns ``strength * sum_{i<j} w_ij D_ij`` (Bai and Zhao, KDD 2022, eq. 6), where
    ``D_ij`` is the distance between the input gradients of tasks ``i`` and ``j`` with respect to the feature map that
    their heads share, and ``w`` are relation weights that are learned by :class:`RelationWeights`.

    Add it to the loss and call ``backward`` once. It acts exactly when gradients are enabled and the outputs carry a
    graph, whatever ``model.training`` says; under ``no_grad`` it returns a zero. It runs no module a second time, draws
    no random number and has no parameters. Hooks on tensors between the feature map and the outputs (full backward
    hooks of heads included) do see the gradient that is taken here.

    In several processes distances and relations are those of the joined batch, by one small all-reduce in each call, which
    every process has to make (also without samples or heads). What is returned is scaled such that the mean over the
    processes is the penalty of the joined batch, as ``DistributedDataParallel`` takes the mean of the gradients:
    ``N n_r / n`` times that of the ``n_r`` samples here, of ``n`` in ``N`` processes; ``N`` times for ``reduction="sum"``.

    Where the authors' code differs from the defaults: it sums over the batch, so that its 0.1 is a ``strength`` of 0.1
    times the batch size here, and learns the relations by another rule. :meth:`authors` follows it exactly.

    With piecewise-linear heads (``Linear``, ReLU) the saliency is locally constant, and the penalty trains the heads
    only; heads with GELU or tanh, or ``target="loss"``, let it reach the backbone.

    Args:
        model: the model, or a wrapper around it; ``None`` if only ``regularizer(outputs=..., features=...)`` is used.
        heads: names (exact, dotted suffix, or pattern such as ``"heads.*"``), modules, a list of them, or a mapping
            ``{task: name or module}``. A ``ModuleDict`` or ``ModuleList`` stands for its children. A single module has
            one output column per task. Left out: found, if the choice is unambiguous.
        feature: the module whose output (``"layer4"``) or input (``"pool:input"``) is the feature map; a part of it as
            ``"encoder:output.last_hidden_state"`` or ``"rnn:output.0"``. If it runs several times, the last run counts.
            A list names several maps, whose saliencies are joined. Left out: the first floating-point tensor that the
            heads are called with.
        output: which part of what a head returns is the task's output: a key, an attribute, an index, a function, or a
            mapping ``{task: part}``. Left out: all of it.
        tasks: T task names; by default taken from the heads.
        target: ``"output"``: saliency of the scalarised output (the paper). ``"loss"``: saliency of the task's loss, per
            sample; then pass ``losses=`` in each call.
        strength: factor of the penalty (the paper's lambda), finite, ``>= 0``.
        metric, reduction: of the distance, as in :func:`task_distances`.
        pool, scalarize, channel_axis: of the saliency, as in :func:`task_saliencies`.
        relations: name of a rule, or a :class:`RelationWeights`.
        optimizer: the optimizer whose steps the relations follow, see :meth:`attach_optimizer`.
        surgery: gradient surgery between the tasks at the feature map that the heads share ("SRDML w/ PCGrad"):
            :class:`PCGrad`, a Gramian weighting of TorchJD, or any callable ``[T, T] -> [T]``. ``loss.backward()`` stays as
            it is; the penalty's gradient is added, never weighed. What it means: :class:`FeatureSurgery`.
        process_group: the data-parallel processes, whose joined batch the penalty and the relations are of: a group of
            torch.distributed, or ``"local"`` for this process alone. By default a new group, over the processes of a
            ``DistributedDataParallel`` around the model, or over all.
        warmup_steps: the strength rises linearly over this many optimizer steps.
        start_step: the strength is 0 for this many optimizer steps before that.
        loss_reduction: what 0-dim task losses are for ``target="loss"``: the ``"mean"`` over the samples of the batch, or
            the ``"sum"``. For anything else, such as a mean over the labelled samples, pass per-sample losses ``[B]``.
        max_tasks_per_step: for very many tasks: take this many in each call, drawn anew each time; the penalty is
            scaled so that its mean is that of all pairs.
        seed: of that draw, which has a generator of its own.
        run_all_heads: for batches that each belong to one task, whose head alone runs in the forward: the other heads are
            run on the same feature map in the call of the regularizer, for their saliency. What they draw (dropout) comes
            from a copy of the random state, and their running statistics stay as they are. In several processes run
            all heads in the model's forward instead.
        cross_sample: ``"warn"`` once, raise an ``"error"`` (:class:`CrossSampleError`), or ``"ignore"`` it if outputs of
            one sample depend on the feature map of another. Measured in the first training call.
        check_finite: raise :class:`NonFiniteError` in a call whose distances are not finite. By default they propagate
            into the loss, so that GradScaler skips the step; the relations do not move then.

    Raises:
        SaliencyRegError: one of its kinds, for arguments that cannot work; the model is then left as it was.

    Example:
        >>> model = nn.ModuleDict({"backbone": nn.Linear(8, 4), "heads": nn.ModuleDict()})
        >>> for task in ("smiling", "young"):
        ...     model["heads"][task] = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 1))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> regularizer = SaliencyRegularizer(model, heads=["smiling", "young"], strength=0.1, optimizer=optimizer)
        >>> feature = model["backbone"](torch.randn(16, 8))
        >>> outputs = {task: head(feature) for task, head in model["heads"].items()}
        >>> loss = sum(output.square().mean() for output in outputs.values()) + regularizer()
        >>> loss.backward()
        >>> optimizer.step()
        >>> regularizer.relations.matrix()
        tensor([[0., 1.],
                [1., 0.]], dtype=torch.float64)
    """

    steps: Tensor
    task_names: Tensor

    def __init__(
        self,
        model: nn.Module | None,
        heads: HeadsChoice = None,
        *,
        feature: FeatureChoice = None,
        output: Item | Mapping[str, Item | None] | None = None,
        tasks: Sequence[str] | None = None,
        target: str = "output",
        strength: float = 0.1,
        metric: str = "l1",
        pool: str | None = "sum",
        reduction: str = "mean",
        scalarize: ScalarizeChoice = "auto",
        channel_axis: int | Sequence[int | None] | None = None,
        relations: str | RelationWeights = "entropic",
        optimizer: Any = None,
        surgery: Any = None,
        process_group: Any = None,
        warmup_steps: int = 0,
        start_step: int = 0,
        loss_reduction: str = "mean",
        max_tasks_per_step: int | None = None,
        seed: int = 0,
        run_all_heads: bool = False,
        cross_sample: str = "warn",
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        check_metric(metric)
        check_reduction(reduction)
        self.metric = metric
        self.reduction = reduction
        self.check_finite = check_finite
        self._schedule = StrengthSchedule(strength, warmup_steps, start_step)
        found = None
        if model is None:
            if heads is not None or feature is not None or output is not None:
                raise ConfigurationError("heads=, feature= and output= need a model. Pass it as first argument.")
            if tasks is None:
                raise MissingArgumentError("without a model the tasks need names. Type tasks=['a', 'b', ...].")
            if surgery is not None:
                raise ConfigurationError("surgery= needs the model whose heads it watches. Pass it as first argument.")
            self.tasks: tuple[str, ...] = tuple(check_task_names(tasks))
        elif not isinstance(model, nn.Module):
            raise WrongTypeError(f"model must be a torch.nn.Module, found {type(model).__name__}.")
        else:
            found = resolve_heads(model, heads, tasks)
            self.tasks = found.tasks
        self._evaluator = SaliencyEvaluator(
            self.tasks,
            target=target,
            scalarize=scalarize,
            pool=pool,
            channel_axis=channel_axis,
            loss_reduction=loss_reduction,
        )
        self.relations = relations_for(relations, self.tasks, bounded=metric in BOUNDED_METRICS)
        self.pending = PendingDistances(len(self.tasks), reduction)
        self.sampler = TaskSampler(max_tasks_per_step, seed)
        self._joiner = JoinedBatch(len(self.tasks), reduction, Ranks(process_group, model, apart=surgery is not None))
        self.surgery = None
        if surgery is not None:
            self.surgery = ForkSurgery(self.tasks, checked_level(surgery), self._joiner.ranks)
        self._first_call = FirstCall(cross_sample)
        self.register_buffer("task_names", torch.tensor(list("\n".join(self.tasks).encode()), dtype=torch.uint8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Mirrors of buffers, so that a device is never waited for.
        self._steps = 0
        self._has_pending = False
        self._reminders = Reminders(self.tasks)
        self._enabled = True
        self._report: SaliencyReport | None = None
        self._feature_shape: list[int] | None = None
        self._closed_form = False
        # Behind a named feature there may be more than the heads.
        self._form = (
            HeadForm.UNKNOWN
            if found is None or feature is not None or output is not None
            else form_of_heads(found.modules)
        )
        self._reaches_backbone = reaches_backbone(self._form, target, scalarize)
        self._step_hook: StepHook | None = None
        self._capture: FeatureCapture | None = None
        inner_optimizer = None if optimizer is None else self._checked_optimizer(optimizer)
        # All arguments have been checked: nothing was set on the model or the optimizer before this line.
        if model is not None and found is not None:
            self._capture = FeatureCapture(
                model, found, feature, output, self.surgery, channel_axis=channel_axis, run_all=bool(run_all_heads)
            )
        if inner_optimizer is not None:
            self._step_hook = StepHook(inner_optimizer, self.step)
        self._update_fork()
        if self._reaches_backbone is False:
            logger.warning(NO_REACH)

    @classmethod
    def authors(
        cls, model: nn.Module | None, heads: HeadsChoice = None, *, strength: float = 0.1, **options: Any
    ) -> SaliencyRegularizer:
        """The conventions of the published code: sums over positions and over the batch, l1, and its relation rule.

        ``strength`` is their ``mu``, 0.1 by default. Their synthetic script keeps it at 0 for the first 11 steps
        (``start_step=11``). Other options are those of the class.

        Raises:
            ConfigurationError: an option that the conventions fix.

        Example:
            >>> heads = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
            >>> SaliencyRegularizer.authors(nn.ModuleDict({"heads": heads})).relations.rule
            'authors'
        """
        fixed: dict[str, Any] = {
            "pool": "sum",
            "reduction": "sum",
            "metric": "l1",
            "relations": "authors",
            "target": "output",
        }
        if clash := sorted(set(fixed) & set(options)):
            raise ConfigurationError(
                f"{clash} are fixed by the authors' conventions. Use SaliencyRegularizer(...) instead."
            )
        return cls(model, heads, strength=strength, **fixed, **options)

    # What a training loop calls.

    def forward(
        self,
        *,
        losses: Losses | Tensor | None = None,
        targets: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        mask: Tensor | Sequence[Tensor | None] | None = None,
        outputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the penalty of the latest forward, and release that forward.

        Args:
            losses: task losses, before any weighting, as a mapping or a sequence of T: 0-dim, or ``[B]`` per sample.
                Needed for ``target="loss"``; otherwise only for ``report.share``, and then their sum is enough.
            targets: class labels per task, for the ``"label"`` scalarisations.
            mask: ``[B, positions...]``, true at real positions (an ``attention_mask``; not a ``key_padding_mask``, which
                is its opposite).
            outputs, features: instead of a captured forward: task outputs, and the feature map ``A`` they were computed
                from (or one alias ``A.view_as(A)`` per output), as in :func:`task_saliencies`.

        Returns:
            0-dim, ``>= 0``, float32 or float64, on the feature map's device. Zero under ``no_grad``, for outputs without a
            graph, for fewer than two tasks in this step, and while ``enabled`` is false. In several processes: this one's
            part, such that the mean over the processes is the penalty of the joined batch.

        Raises:
            CaptureError: no unread forward, or one that cannot be used; without any head in all processes (NoHeadRanError).
            SaliencyRegError: one of its kinds, for arguments that do not fit.
        """
        if not self._enabled or not torch.is_grad_enabled():
            if self._capture is not None:
                self._capture.drop()
            return self._zero()
        if outputs is not None or features is not None:
            if self.surgery is not None:
                raise ConfigurationError(
                    "outputs= and features= cannot be used under surgery, whose fork they may not have come from. Call "
                    "regularizer() after the model, or leave surgery= out."
                )
            captured = captured_by_hand(outputs, features, self.tasks)
        else:
            try:
                captured = self._take()
            except NoHeadRanError as error:
                return self._nothing_here(error, losses)
        if captured is None:
            return self._zero()
        if self._joiner.ranks.size > 1 and self._capture is not None and self._capture.run_all:
            raise ConfigurationError(
                "run_all_heads=True runs heads behind the model's forward, where DistributedDataParallel does not see them. "
                "In several processes run all heads in the forward, and take the loss of one."
            )
        whole = nullcontext() if self._capture is None else self._capture.sharded.gathered()
        with whole, nullcontext() if self.surgery is None else self.surgery.passing():
            return self._call(captured, losses, targets, mask, outputs)

    def _call(
        self,
        captured: list[Captured],
        losses: Losses | Tensor | None,
        targets: Mapping[str, Tensor] | Sequence[Tensor] | None,
        mask: Tensor | Sequence[Tensor | None] | None,
        outputs: Mapping[str, Tensor] | Sequence[Tensor] | None,
    ) -> Tensor:
        if self._joiner.ranks.size > 1:
            differentiated = losses if self._evaluator.target == "loss" else outputs
            given = differentiated.values() if isinstance(differentiated, Mapping) else differentiated
            self._first_call.refuse_static_graph(() if given is None else given)
        feature = captured[0].feature
        if mask is None and outputs is None:
            mask = self._mask_of(feature)
        total_loss = sum_of_losses(losses, self.tasks, feature.device)
        heads, columns = self._heads_behind(outputs)
        strength = self.current_strength
        only, factor = self._sample(range(len(self.tasks)) if columns else captured[0].present)
        evaluated = self._evaluator.evaluate(
            captured, heads, columns, losses=losses, targets=targets, mask=mask, create_graph=strength > 0, only=only
        )
        if len(evaluated.present) < 2 or evaluated.batch_size == 0:
            if self._joiner.ranks.size > 1:  # the others may have more
                brought = Brought(evaluated.present, None, evaluated.batch_size, total_loss)
                self._report_on(*self._join(brought, feature.device), strength * factor)
            return self._taking_part(self._zero(feature), captured)
        if not evaluated.closed_form:
            needed = self.surgery is not None
            self._first_call.check_samples(captured, heads, stacklevel=5, needed=needed)  # past torch.nn.Module
        penalty = self._penalty(evaluated, feature, strength * factor, total_loss)
        if self.surgery is not None and penalty.requires_grad:
            apart = self._first_call.found_unmixed(captured, heads)
            penalty = kept_out_of_surgery(penalty, evaluated, captured, self.surgery, samples_apart=apart)
        return self._taking_part(penalty, captured)

    def step(self) -> None:
        """Move the relations once, by the distances since the last step, and count one optimizer step.

        An attached optimizer calls this; call it yourself, after each update, in a loop without one.
        """
        if self._has_pending:
            distances, seen = self.pending.take()
            self.relations.update(distances, self.current_strength, observed=seen)
            self._has_pending = False
        self._reminders.stepped()
        self._steps += 1
        self.steps.fill_(self._steps)
        self._update_fork()

    def attach_optimizer(self, optimizer: Any) -> None:
        """Let the relations follow this optimizer's steps (and no longer those of an earlier one).

        Wrappers that carry the optimizer as ``.optimizer`` are unwrapped. A step that GradScaler skips does not count.

        Raises:
            WrongTypeError: no optimizer.
        """
        inner = self._checked_optimizer(optimizer)
        if self._step_hook is not None:
            self._step_hook.remove()
        self._step_hook = StepHook(inner, self.step)

    def remove(self) -> None:
        """Take everything off the model and the optimizer. The relations stay readable."""
        if self._capture is not None:
            self._capture.remove()
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None

    # What can be read and set.

    @property
    def strength(self) -> float:
        """Factor of the penalty after warm-up; can be set at any time."""
        return self._schedule.strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._schedule.strength = non_negative_number("strength", value)
        self._update_fork()

    @property
    def current_strength(self) -> float:
        """The factor in the present optimizer step: 0 for ``start_step`` steps, then a linear rise, then ``strength``."""
        return self._schedule.at(self._steps)

    @property
    def enabled(self) -> bool:
        """While false, calls return zero and the hooks do nothing."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = bool(value)
        if self._capture is not None:
            self._capture.enabled = self._enabled

    @property
    def follows_optimizer(self) -> bool:
        """Whether the relations move with the steps of an attached optimizer."""
        return self._step_hook is not None

    @property
    def report(self) -> SaliencyReport | None:
        """Figures of the latest call that acted; ``None`` before it. Those of the surgery come with the backward pass."""
        if self._report is None or self.surgery is None:
            return self._report
        return replace(self._report, surgery=self.surgery.report)

    def describe(self) -> str:
        """A few lines: heads and feature that were found, form of the saliency, reach of the penalty, relations."""
        heads, feature = ("given in each call",) * 2 if self._capture is None else self._capture.describe()
        shape = "not seen yet" if self._feature_shape is None else f"{self._feature_shape}"
        relations = f"{self.relations}, " + (
            "following an optimizer"
            if self.follows_optimizer
            else "moved by .step() alone, as no optimizer is attached"
        )
        lines = {
            "tasks": f"{len(self.tasks)}: {first_few(self.tasks)}",
            "heads": heads,
            "feature": f"{feature}, shape {shape}",
            "saliency": self._evaluator.describe(),
            "form": "closed form: the heads' weight rows" if self._closed_form else self._form.value,
            "distance": f"{self.metric}, {self.reduction} over the batch",
            "reaches the backbone": REACH[self._reaches_backbone],
            "strength": f"{self.current_strength:g} in optimizer step {self._steps}, {self.strength:g} after warm-up",
            "relations": relations,
        }
        if self.surgery is not None:
            lines["gradient surgery"] = f"{type(self.surgery.weighting).__name__} (feature)"
        width = max(map(len, lines))
        return "SaliencyRegularizer\n" + "\n".join(f"  {name:<{width}}  {value}" for name, value in lines.items())

    def __repr__(self) -> str:
        return self.describe()

    # How it is done.

    def _take(self) -> list[Captured] | None:
        if self._capture is None:
            raise CaptureError(
                "this regularizer is attached to no model (it was built without one, or is a copy). Build it with the "
                "model, or pass regularizer(outputs=..., features=...)."
            )
        return self._capture.take()

    def _nothing_here(self, error: NoHeadRanError, losses: Losses | Tensor | None) -> Tensor:
        """No head ran on this process: right if one did on another."""
        zero = self._zero()
        if self._joiner.ranks.size == 1:
            raise error
        _, factor = self._sample(())
        brought = Brought((), None, 0, sum_of_losses(losses, self.tasks, zero.device), error)
        self._report_on(*self._join(brought, zero.device), self.current_strength * factor)
        return self._taking_part(zero, ())

    def _taking_part(self, penalty: Tensor, captured: Sequence[Captured]) -> Tensor:
        if self.surgery is None:
            return penalty
        return taking_part(penalty, self.surgery, captured[0].cuts if captured else ())

    def _sample(self, ran: Sequence[int]) -> tuple[list[int] | None, float]:
        """Tasks of this step. In several processes they are drawn from all tasks: those that ran may differ."""
        if self._joiner.ranks.size == 1:
            return self.sampler.choose(ran)
        return self.sampler.choose(range(len(self.tasks)))

    def _penalty(self, evaluated: Evaluated, feature: Tensor, factor: float, losses: Tensor | None) -> Tensor:
        present = evaluated.present
        distances = pairwise_distances(evaluated.saliencies, self.metric, self.reduction)
        if self.reduction == "sum" and evaluated.saliencies.shape[1] != evaluated.batch_size:
            distances = distances * evaluated.batch_size  # one row stands for all samples
        if self.steps.device != distances.device:
            self.to(distances.device)
        brought = Brought(present, distances.detach(), evaluated.batch_size, losses)
        joined, relations = self._join(brought, distances.device)
        weights = relations if joined.factors is None else relations * joined.factors.to(relations)
        if len(present) < len(self.tasks):
            weights = weights[present][:, present]
        if factor > 0:
            penalty = factor * (weights.to(distances.dtype) * distances).triu(1).sum()
            self._measure_reach(penalty, evaluated)
        else:
            penalty = distances.new_zeros(())  # also where distances are not finite
        self._report_on(joined, relations, factor, penalty)
        self._feature_shape = list(feature.shape)
        self._closed_form = evaluated.closed_form
        self._reminders.called(present, self._step_hook is not None, stacklevel=6)  # past torch.nn.Module
        return penalty

    def _join(self, brought: Brought, device: torch.device) -> tuple[Joined, Tensor]:
        """What all processes brought, which goes into the coming step of the relations; and these as they are."""
        if self.steps.device != device:
            self.to(device)
        relations = self.relations.matrix()
        joined = self._joiner.join(brought, relations, self._settings)
        if self.check_finite and not torch.isfinite(joined.distances).all():
            raise NonFiniteError(
                f"the distances between {[self.tasks[task] for task in brought.present]} hold NaN or infinite values. Look "
                "at the outputs and the feature map of this batch (of all processes), or leave check_finite=False and let "
                "GradScaler skip the step."
            )
        self.pending.add(joined.distances, joined.samples)
        self._has_pending = True  # on all processes alike, also on one that brought nothing
        return joined, relations

    def _report_on(self, joined: Joined, relations: Tensor, factor: float, penalty: Tensor | None = None) -> None:
        if penalty is None or joined.factors is not None:  # of several processes, not what this one returns
            penalty = factor * (relations.to(joined.distances) * joined.distances).triu(1).sum()
        self._report = SaliencyReport(
            tasks=self.tasks,
            samples=joined.samples.diagonal(),
            strength=self.current_strength,
            penalty=penalty.detach(),
            losses=joined.losses,
            distances=torch.where(joined.samples > 0, joined.distances, torch.nan),
            relations=relations,
        )

    def _settings(self, thorough: bool) -> dict[str, Any]:
        return settings(
            self.tasks,
            self._steps,
            self._schedule,
            self.relations,
            (self.metric, self.reduction),
            self._evaluator,
            self._capture,
            self.sampler,
            self.surgery,
            self.check_finite,
            thorough,
        )

    def _measure_reach(self, penalty: Tensor, evaluated: Evaluated) -> None:
        known = self._reaches_backbone
        names = [self.tasks[task] for task in evaluated.present]
        self._reaches_backbone = self._first_call.reach(penalty, evaluated.saliencies, names, evaluated.edges, known)
        if known is None and self._reaches_backbone is False:
            logger.warning(NO_REACH)

    def _mask_of(self, feature: Tensor) -> Tensor | None:
        """For classes that know what is padding in a captured feature map; here, nothing is."""
        return None

    def _heads_behind(self, outputs: object) -> tuple[Sequence[nn.Module], bool]:
        if self._capture is None or outputs is not None:
            return (), False
        return self._capture.heads.modules, self._capture.heads.columns

    def _checked_optimizer(self, optimizer: Any) -> torch.optim.Optimizer:
        inner = unwrap_optimizer(optimizer)
        if self.surgery is not None:
            check_not_closure_only(inner)
        return inner

    def _zero(self, like: Tensor | None = None) -> Tensor:
        device = self.steps.device if like is None else like.device
        if like is None and self._capture is not None:
            device = self._capture.device() or device
        return torch.zeros((), device=device)

    def _update_fork(self) -> None:
        # A penalty that is off leaves the model's graph as it is, to the bit.
        if self._capture is not None:
            self._capture.fork = self.current_strength > 0

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not attached: the hooks belong to the original and its model.
        state = vars(self).copy()
        state.update(_capture=None, _step_hook=None, _report=None)
        return state

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        check_state(state_dict, prefix, self.tasks, self.task_names, self.surgery)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._steps = int(self.steps)
        pending = state_dict.get(prefix + "pending.samples")
        self._has_pending = pending is not None and bool((pending > 0).any())
        self._update_fork()
