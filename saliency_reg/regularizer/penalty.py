"""One call of the regularizer: from a captured forward straight down to the penalty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..capture import CapturedForward
from ..distributed import Brought, Joined, JoinedBatch, Ranks, StaticGraphCheck
from ..errors import NonFiniteError
from ..relations import ALL_PAIRS, PendingDistances, RelationWeights
from ..report import SaliencyReport
from ..saliency import Given, Saliencies, SaliencyExtractor, batch_first, pairwise_distances
from ..surgery.feature import GradientCombiner, joining_collectives, kept_out_of_surgery
from ..tasks import sum_of_losses
from ..torch_tools import names_to_bytes, real_device
from .earlier_pickles import as_now
from .obstacles import Obstacles
from .options import Options, check_weighting_level
from .reach import Reach
from .reminders import Reminders
from .sample_mixing import SampleMixing
from .state.common_tasks import TasksLoaded, of_common_tasks
from .state.saved_state import check_state, check_state_in_use
from .strength import AUTO, AutomaticStrength, HasStrength, own_penalty, whole_penalty
from .task_sample import TaskSampler


class Penalty(HasStrength):
    """Makes the penalty of a forward, and keeps what outlives it: relations, pending distances, counts, the report.

    Not attached to anything; :class:`SaliencyRegularizer`, which derives from it, is. ``heads`` is ``None`` where they
    do not tell all that is between the feature map and the outputs.
    """

    steps: Tensor
    steps_as_float: Tensor
    task_names: Tensor
    saliency_seen: Tensor
    #: The buffer with the names that was found to hold those of the tasks.
    _checked_names: Tensor | None = None
    #: What is about to be done to the tasks, in words.
    _changing: str | None = None
    in_a_copy: ClassVar[dict[str, Any]] = {"_report": None}

    def __init__(
        self,
        tasks: Sequence[str],
        options: Options,
        relations: str | RelationWeights,
        surgery: Any,
        ranks: Ranks,
        heads: Sequence[nn.Module] | None,
    ) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] = tuple(tasks)
        self._extractor = extractor_of(self.tasks, options)
        self.relations = options.relations_of(relations, self.tasks)
        self.pending = PendingDistances(len(self.tasks), options.reduction)
        self.sampler = TaskSampler(options.max_tasks_per_step, options.seed)
        self._joined_batch = JoinedBatch(options.reduction, ranks)
        self.surgery: GradientCombiner | None = None
        if surgery is not None:
            check_weighting_level(surgery)
            self.surgery = GradientCombiner(self.tasks, surgery, ranks)
        self.register_buffer("task_names", names_to_bytes(self.tasks))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=real_device()))
        # Averages of buffers (EMA, SWA) round whole numbers down; beside this one it is seen.
        self.register_buffer("steps_as_float", torch.zeros((), dtype=torch.float64, device=real_device()))
        self.register_buffer("saliency_seen", torch.zeros(len(self.tasks), dtype=torch.int64, device=real_device()))
        self._checked_names = self.task_names
        self._static_graph = StaticGraphCheck()
        self._mixing = SampleMixing(options.cross_sample)
        self._obstacles = Obstacles()
        self._reach = Reach(heads, options.target, options.scalarize, options.custom_backward)
        # By what layers tell: the same in all processes.
        heads_alone = self._reach.reaches is False
        self._options = options.with_share(heads_alone)
        self.automatic_strength = AutomaticStrength(heads_alone) if options.strength == AUTO else None
        self._reminders = Reminders(self.tasks)
        self._report: SaliencyReport | None = None
        self.register_load_state_dict_post_hook(_loaded)  # type: ignore[no-untyped-call]  # behind its parts
        self._seen: tuple[list[int], bool] | None = None  # shape of the feature map; whether the form was closed

    # What can be read and set.

    @property
    def pool(self) -> str | None:
        """How saliencies are pooled over positions; can be set at any time."""
        return self._options.pool

    @pool.setter
    def pool(self, value: str | None) -> None:
        self._options = replace(self._options, pool=value)
        self._extractor.pool = value

    @property
    def check_finite(self) -> bool:
        """Whether a call with distances that are not finite raises; can be set at any time."""
        return self._options.check_finite

    @check_finite.setter
    def check_finite(self, value: bool) -> None:
        self._options = replace(self._options, check_finite=value)

    @property
    def metric(self) -> str:
        """The distance, as in :func:`task_distances`; fixed."""
        return self._options.metric

    @property
    def reduction(self) -> str:
        """``"mean"`` or ``"sum"`` of the distance over the batch; fixed."""
        return self._options.reduction

    @property
    def target(self) -> str:
        """What the saliency is of: ``"output"`` or ``"loss"``."""
        return self._options.target

    @property
    def follows_optimizer(self) -> bool:
        """Whether the relations move with the steps of an attached optimizer."""
        return False

    @property
    def report(self) -> SaliencyReport | None:
        """Figures of the latest call that acted; ``None`` before it. Those of the surgery come with the backward pass."""
        if self._report is None or self.surgery is None:
            return self._report
        return replace(self._report, surgery=self.surgery.report)

    def step(self) -> None:
        """Move the relations once, by the distances since the last step, and count one optimizer step.

        An attached optimizer calls this; call it yourself, after each update, in a loop without one.
        """
        if self.pending.any:
            distances, seen, tasks = self.pending.take()
            self.relations.update(distances, self._strength_of_relations(), observed=seen, tasks=tasks)
        self._reminders.stepped()
        if self.automatic_strength is not None and self._options.share is not None:
            self.automatic_strength.step(self._steps_so_far(), self._options.share)
        self._set_steps(self._steps_so_far() + 1)
        self._strength_changes(stepped=True)

    def _steps_so_far(self) -> int:
        """Return the optimizer steps so far, whoever wrote them."""
        check_state_in_use(self)
        return int(self._value("steps"))

    def _names_as_bytes(self) -> Tensor:
        return names_to_bytes(self.tasks)

    def _set_steps(self, steps: int) -> None:
        self._set_value("steps", steps)
        if "steps_as_float" in self._buffers:  # which older pickles lack
            self._set_value("steps_as_float", steps)

    # How it is done.

    @property
    def _evaluator(self) -> SaliencyExtractor:
        return self._extractor  # its name in earlier versions

    def _penalty_of(self, forward: CapturedForward, given: Given) -> Tensor:
        """Return the penalty of a forward: in several processes of the joined batch, this process' part of it.

        All processes come here together. A forward without heads goes the same way, with zeros.
        """
        if self.steps.device != forward.device:
            self.to(forward.device)
        if self._options.batch_axis != 0:
            batch_first(forward, self._options.batch_axis)
        ranks, strength = self._joined_batch.ranks, self.current_strength
        if ranks.size > 1:
            self._static_graph.check(_values(given.losses if self._options.target == "loss" else given.outputs))
        losses = sum_of_losses(given.losses, self.tasks, forward.device)
        auto = self.automatic_strength
        waits = auto is not None and auto.first_step < 0
        forward = self._obstacles.kept_clear(forward, self.tasks, 1.0 if waits else strength)
        looks = (
            waits and self._report is None
        )  # what a penalty would meet is told at once, and not when it begins to act
        # In several processes tasks are drawn from all: those that ran may differ.
        drawn_from = forward.tasks(len(self.tasks)) if ranks.size == 1 else range(len(self.tasks))
        chosen, factor = self.sampler.choose(drawn_from)
        had = len(self._extractor.have_saliency)
        saliencies = self._extractor.extract(forward, given, create_graph=strength > 0 or looks, only=chosen)
        if len(self._extractor.have_saliency) > had and "saliency_seen" in self._buffers:
            self.saliency_seen[list(self._extractor.have_saliency)] = 1
        apart = self._mixing.are_samples_apart(forward, saliencies, needed=self.surgery is not None)
        self._mixing.tell_left_out(forward, saliencies)
        distances = self._distances(saliencies)
        brought = Brought(saliencies.present, distances.detach(), saliencies.samples, losses, forward.no_heads)
        among = range(len(self.tasks)) if len(self.tasks) <= ALL_PAIRS else drawn_from if chosen is None else chosen
        relations = self.relations.among(among)
        joined = self._joined_batch.join(brought, among, relations, self._settings)
        if auto is not None:
            counts = self._steps_so_far() >= self._options.start_step
            auto.measure(joined, relations, factor, by_samples=self.reduction == "mean", counts=counts)
        self._keep_pending(joined, saliencies.present)
        penalty = own_penalty(distances, relations, joined, saliencies.present, strength * factor)
        if (strength * factor > 0 or looks) and saliencies.comparable:
            whole = own_penalty(distances, relations, joined, saliencies.present, factor) if looks else penalty
            self._reach.measure(whole, saliencies, forward, self.tasks, alone=ranks.size == 1)
        self._report = self._report_of(joined, relations, strength * factor, penalty)
        if saliencies.comparable:
            self._seen = list(forward.features[0].tensor.shape), saliencies.closed_form
        ran = forward.tasks(len(self.tasks))
        present = ran if saliencies.left_out is not None else saliencies.present  # of which the user was told
        self._reminders.called(ran, present, self.follows_optimizer, ranks.size > 1)
        if auto is None or auto.is_given:
            self._reminders.weighed_up(self._report, factor, self.strength)
        elif waits:
            self._reminders.waits(self.follows_optimizer)
        if self.surgery is not None:
            penalty = kept_out_of_surgery(penalty, saliencies, forward, self.surgery, samples_apart=apart)
            penalty = joining_collectives(penalty, forward.carried, self.surgery)
        self._reminders.returned(penalty)
        self._obstacles.call_ends()
        return penalty

    def _distances(self, saliencies: Saliencies) -> Tensor:
        """``[t, t]`` among the tasks that ran, zeros without samples."""
        present, values = saliencies.present, saliencies.values
        if not saliencies.comparable:
            zeros = torch.zeros(len(present), len(present), device=values.device)
            # Where tasks were left out, with a graph: for a lone backward().
            return zeros if saliencies.left_out is None else zeros + values[:0].sum()
        distances = pairwise_distances(values, self._options.metric, self._options.reduction, saliencies.real)
        if self._options.reduction == "sum" and values.shape[1] != saliencies.batch_size:
            distances = distances * saliencies.batch_size  # one row stands for all samples
        return distances

    def _keep_pending(self, joined: Joined, present: Sequence[int]) -> None:
        """Add the distances to those of the coming step of the relations, on all processes alike."""
        if self._options.check_finite and not torch.isfinite(joined.distances).all():
            raise NonFiniteError(
                f"the distances between {[self.tasks[task] for task in present]} hold NaN or infinite values. Look at the "
                "outputs and the feature map of this batch (of all processes), or leave check_finite=False and let "
                "GradScaler skip the step."
            )
        self.pending.add(joined.distances, joined.samples, joined.tasks)

    def _report_of(self, joined: Joined, relations: Tensor, factor: float, penalty: Tensor) -> SaliencyReport:
        if joined.factors is not None:  # of several processes, not what this one returns
            penalty = whole_penalty(joined, relations, factor)
        return SaliencyReport.among(
            joined.tasks,
            tasks=self.tasks,
            samples=joined.samples.diagonal(),
            strength=self.current_strength,
            penalty=penalty.detach(),
            losses=joined.losses,
            distances=torch.where(joined.samples > 0, joined.distances, torch.nan),
            relations=relations,
        )

    def _settings(self, thorough: bool) -> Mapping[str, Any]:
        """What has to be the same in all processes, in words; ``thorough``: with the relation weights."""
        found: dict[str, Any] = {
            "tasks": self.tasks,
            "change of tasks": self._changing,
            **self._options.words(),
            "seed": self.sampler.seed,
            "optimizer steps so far": self._steps_so_far(),
            "relations": repr(self.relations),
            "surgery": None if self.surgery is None else type(self.surgery.weighting).__name__,
        }
        if thorough:
            found["relation weights"] = self.relations.matrix().flatten().tolist()
            found["strength in use"] = [self.strength]
        return found

    def _described(self) -> dict[str, str]:
        closed_form = self._seen is not None and self._seen[1]
        moved = (
            "following an optimizer"
            if self.follows_optimizer
            else "moved by .step() alone, as no optimizer is attached"
        )
        lines = {
            "saliency": self._options.saliency(),
            "form": "closed form: the heads' weight rows" if closed_form else self._reach.form.value,
            "distance": f"{self.metric}, {self.reduction} over the batch",
            "reaches the backbone": self._reach.describe(),
            "strength": self._strength_in_words(),
            "relations": f"{self.relations}, {moved}",
        }
        if self.surgery is not None:
            lines["gradient surgery"] = f"{type(self.surgery.weighting).__name__} (feature)"
        return lines

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._obstacles = Obstacles()
        super().__setstate__(as_now(state))  # type: ignore[no-untyped-call]
        if "automatic_strength" not in self._modules:
            vars(self).setdefault("automatic_strength", None)  # the same
        vars(self._extractor).setdefault("have_saliency", set())  # which earlier versions lack

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Also refuse the state of other tasks, or of another surgery."""
        check_state(self, state_dict, prefix)
        super().check_loaded(state_dict, prefix)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False, *, tasks: TasksLoaded = "all"
    ) -> Any:
        """Load a state dict, or nothing of it if it does not fit (StateMismatchError).

        ``tasks="common"`` takes one of other tasks by their names: pairs of tasks that both have get the relations that were
        saved, the others begin as with ``add_task``; steps and strength are those that were saved.
        """
        return super().load_state_dict(of_common_tasks(self, state_dict, tasks), strict, assign)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if "saliency_seen" in self._buffers and not self.saliency_seen.is_meta:
            self._extractor.have_saliency.clear()
            self._extractor.have_saliency.update(self.saliency_seen.nonzero().flatten().tolist())
        self._strength_changes()


def extractor_of(tasks: Sequence[str], options: Options) -> SaliencyExtractor:
    return SaliencyExtractor(
        tasks,
        target=options.target,
        scalarize=options.scalarize,
        pool=options.pool,
        channel_axis=options.channel_axis,
        loss_reduction=options.loss_reduction,
        fix_statistics=options.cross_sample == "fix",
    )


def _loaded(penalty: Penalty, _: Any) -> None:
    penalty._strength_changes()


def _values(given: Any) -> Sequence[Any]:
    return list(given.values() if isinstance(given, Mapping) else given or ())
