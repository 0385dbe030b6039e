"""One call of Rep-MTL: from a captured forward to the penalty, and what outlives the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...capture import CapturedForward
from ...distributed import Ranks, StaticGraphCheck, compare_settings
from ...errors import MissingArgumentError, ShapeError, StateMismatchError, WrongTypeError
from ...report import RepMTLReport
from ...saliency import Given, SaliencyExtractor, batch_first
from ...tasks import Losses, losses_per_task
from ...torch_tools import StateModule, names_from_bytes, names_to_bytes, real_device, warn_user
from ..obstacles import Obstacles
from ..sample_mixing import SampleMixing
from ..strength import ramp
from .joined_terms import JoinedTerms, Wanted, inverse_losses, joined_terms
from .loss_reach import LossReach
from .options import RepMTLOptions

#: Calls without two tasks at any sample, after which the user is told.
CALLS = 100
_NEVER_TOGETHER = (
    f"in {CALLS} calls no sample has had a saliency of two tasks, so the penalties of Rep-MTL were 0 in all of them: they "
    "compare the tasks within each sample. Pass the losses of all tasks, with 0 where a label is missing, or leave it out."
)


class LossPenalties(StateModule):
    """Makes the penalty of a forward. Not attached to anything; :class:`RepMTL`, which derives from it, is."""

    steps: Tensor
    task_names: Tensor
    in_a_copy: ClassVar[dict[str, Any]] = {"_report": None}

    def __init__(
        self, tasks: Sequence[str], options: RepMTLOptions, ranks: Ranks, heads: Sequence[nn.Module] | None
    ) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] = tuple(tasks)
        #: As it was built; fixed.
        self.options = options
        self._extractor = SaliencyExtractor(
            self.tasks,
            target="loss",
            scalarize="auto",
            pool=None,
            channel_axis=options.channel_axis,
            loss_reduction="sum",
            fix_statistics=options.cross_sample == "fix",
        )
        self._ranks = ranks
        self._compared = False
        self._static_graph, self._obstacles = StaticGraphCheck(), Obstacles()
        self._mixing, self._reach = SampleMixing(options.cross_sample), LossReach(heads, options.custom_backward)
        self._calls_apart: int | None = 0  # so far, until tasks come together
        self._report: RepMTLReport | None = None
        self.register_buffer("task_names", names_to_bytes(self.tasks))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=real_device()))

    @property
    def report(self) -> RepMTLReport | None:
        """Figures of the latest call that acted; ``None`` before it."""
        return self._report

    @property
    def current_strength(self) -> float:
        """What both strengths are multiplied by in the present optimizer step: 0 at first, then a linear rise, then 1."""
        return ramp(int(self._value("steps")) - self.options.start_step, self.options.warmup_steps)

    @property
    def acts(self) -> bool:
        """Whether a penalty is taken in the present optimizer step."""
        options = self.options
        return self.current_strength > 0 and options.task_specific_strength + options.cross_task_strength > 0

    def step(self) -> None:
        """Count one optimizer step. An attached optimizer calls this; call it yourself in a loop without one."""
        self._set_value("steps", self._value("steps") + 1)
        self._strength_changes(stepped=True)

    def _strength_changes(self, *, stepped: bool = False) -> None:
        """For derived classes: the strength is, or may become, another one."""

    def _penalty_of(self, forward: CapturedForward, losses: Losses | None, mask: Tensor | None) -> Tensor:
        """Return the penalty of a forward. All processes come here together, also one without heads."""
        if self.steps.device != forward.device:
            self.to(forward.device)
        if self._ranks.size > 1 and not self._compared:
            compare_settings(self._settings(), self._ranks)
            self._compared = True
        if self.options.batch_axis != 0:
            batch_first(forward, self.options.batch_axis)
        given = self._checked_losses(losses, forward)
        if self._ranks.size > 1:
            self._static_graph.check(given.values())
        options, strength, acts = self.options, self.current_strength, self.acts
        forward = self._obstacles.kept_clear(forward, self.tasks, float(acts))
        named = {self.tasks[task]: loss for task, loss in given.items()} if forward.features else {}
        saliencies = self._extractor.extract(forward, Given(named, mask=mask), create_graph=acts)
        self._mixing.are_samples_apart(forward, saliencies, needed=False)
        factors = inverse_losses(given, self.tasks, forward.device, self._ranks) if options.log_losses else None
        wanted = Wanted(options.task_specific_strength > 0, options.cross_task_strength > 0, options.temperature)
        terms = joined_terms(saliencies, factors, wanted, len(self.tasks), self._ranks)
        whole = options.task_specific_strength * terms.task_specific + options.cross_task_strength * terms.cross_task
        if acts and saliencies.comparable and bool(terms.own > 0):
            # Its sign says nothing here, as the alignment may be negative.
            known = whole * whole.detach().sign()
            self._reach.measure(known, saliencies, forward, self.tasks, alone=self._ranks.size == 1)
        else:
            whole = whole.detach()  # a backward pass through all heads would find zeros
        # The gradients of the processes are averaged, and each has that of its own samples.
        penalty = strength * (whole + (self._ranks.size - 1) * (whole - whole.detach()))
        if not acts:
            penalty = torch.zeros_like(whole)  # also where it is not finite
        self._note(terms, wanted, strength, penalty)
        self._obstacles.call_ends()
        return penalty

    def _checked_losses(self, losses: Losses | None, forward: CapturedForward) -> dict[int, Tensor]:
        if losses is None:
            raise MissingArgumentError(
                "Rep-MTL takes the saliency of the task losses. Pass rep(losses={task: loss, ...}), one value per sample."
            )
        found = losses_per_task(losses, self.tasks)
        for task, loss in found.items():
            if not isinstance(loss, Tensor):
                raise WrongTypeError(
                    f"the loss of task {self.tasks[task]!r} must be a tensor, found {type(loss).__name__}."
                )
            if loss.ndim != 1 or (forward.features and len(loss) != forward.batch_size):
                size = forward.batch_size if forward.features else "B"
                raise ShapeError(
                    f"the loss of task {self.tasks[task]!r} has shape {list(loss.shape)}, expected one value per sample, "
                    f"[{size}]. Use reduction='none' (and the mean over what a sample has several of), and 0 where a label "
                    "is missing."
                )
        return found

    def _note(self, terms: JoinedTerms, wanted: Wanted, strength: float, penalty: Tensor) -> None:
        self._report = RepMTLReport(
            self.tasks,
            terms.samples,
            strength,
            penalty.detach(),
            terms.task_specific.detach() if wanted.task_specific else None,
            terms.cross_task.detach() if wanted.cross_task else None,
        )
        if self._calls_apart is None:
            return
        self._calls_apart = None if bool(terms.together > 0) else self._calls_apart + 1
        if self._calls_apart == CALLS:
            self._calls_apart = None
            warn_user(_NEVER_TOGETHER)

    def _settings(self) -> Mapping[str, Any]:
        """What has to be the same in all processes, in words."""
        return {"tasks": self.tasks, **self.options.words(), "optimizer steps so far": self._value("steps")}

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Also refuse the state of other tasks."""
        saved = state_dict.get(prefix + "task_names")
        known = isinstance(saved, Tensor) and saved.ndim == 1 and not saved.is_meta
        names = list(self.tasks) if saved is None or not known else names_from_bytes(saved)
        if names != list(self.tasks):
            raise StateMismatchError(
                f"the state dict was saved for the tasks {names}, but this RepMTL has {list(self.tasks)}. Build it with "
                "the same tasks in the same order."
            )
        super().check_loaded(state_dict, prefix)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._strength_changes()
