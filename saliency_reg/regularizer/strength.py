"""How strong the penalty is in each optimizer step: by a number, or by a share of the task losses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..distributed import Joined
from ..errors import MissingArgumentError
from ..report import SaliencyReport
from ..tasks import places_in
from ..torch_tools import StateModule, non_negative_number, real_device

if TYPE_CHECKING:
    from .options import Options

logger = logging.getLogger("saliency_reg")

#: ``strength=`` for one that holds a share.
AUTO = "auto"
#: Optimizer steps over which penalty and losses are measured, before the strength is found and each time it is found anew.
WINDOW = 10
#: Share of the penalty in the task losses, if none is given: where it trains the heads only, and where it reaches the
#: backbone, too, or may do so (docs/defaults.md).
HEADS_SHARE, BACKBONE_SHARE = 0.2, 0.001
#: What else to try.
USEFUL_SHARES = (0.01, 1.0)
#: Below and above, the user is told.
LEAST_SHARE, MOST_SHARE = 0.0005, 10.0


class AutomaticStrength(StateModule):
    """Holds the penalty at a share of the task losses: in each window of steps by what was measured in the one before.

    A strength that was kept from the start would drown losses that fall, of tasks that stay apart. Nor does it grow for ever
    while heads become alike, which then could not part again: ``of_heads_alone`` it makes the penalty of the first window at
    most as large as the losses (or ``share`` times, if that is more); where the backbone learns from the penalty, too, it is
    never above the strength of the first window.

    All it is given is the same in all processes, and so is what it finds.
    """

    any_values: ClassVar[tuple[str, ...]] = ("acts_from",)
    penalty: Tensor  # at a strength of 1, summed over the calls of this window, each times its samples
    losses: Tensor  # the same of the task losses, without their sign
    measured: Tensor  # 1 if there was a call since the latest step
    steps: Tensor  # of this window with a call
    strength: Tensor  # 0 in the first window
    limit: Tensor  # of the strength
    acts_from: Tensor  # the optimizer step in which it acts first; -1 in the first window
    given: Tensor  # 1 if the user took over

    def __init__(self, of_heads_alone: bool = False) -> None:
        super().__init__()
        self.of_heads_alone = of_heads_alone
        for name in ("penalty", "losses", "strength", "limit"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64, device=real_device()))
        for name in ("measured", "steps", "acts_from", "given"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=real_device()))
        self.restart()

    @property
    def value(self) -> float:
        """The strength of now, after warm-up."""
        return float(self._value("strength"))

    @property
    def first_step(self) -> int:
        """The optimizer step in which it acts first; -1 in the first window."""
        return int(self._value("acts_from"))

    @property
    def is_given(self) -> bool:
        """Whether the user has set a number in its place."""
        return bool(self._value("given"))

    @property
    def steps_measured(self) -> int:
        """How many of the present window."""
        return int(self._value("steps"))

    @torch.no_grad()
    def measure(self, joined: Joined, relations: Tensor, factor: float, *, by_samples: bool, counts: bool) -> None:
        """Add one call, ``factor`` being what a sum over some pairs of tasks stands for; what is not finite is left out.

        Calls count with their samples, or all alike; those before the first step of it not at all.

        Raises:
            MissingArgumentError: no losses were given. In all processes at once; on a GPU in the first call of a window.
        """
        if self.is_given:
            return
        looks = joined.distances.device.type == "cpu" or self.steps_measured + self._value("measured") == 0
        if joined.losses is None or (looks and bool(joined.losses_missing)):
            raise MissingArgumentError(
                "strength='auto' holds the penalty at a share of the task losses, and no losses were given. Pass "
                "regularizer(losses=losses), or their sum, before any division; or a number as strength= when you build it."
            )
        if not counts:
            return
        penalty, losses = whole_penalty(joined, relations, factor), joined.losses.abs()
        samples = joined.samples.diagonal().max() if by_samples else 1
        finite = torch.isfinite(penalty) & torch.isfinite(losses)
        for own, value in ((self.penalty, penalty), (self.losses, losses)):
            own += torch.where(finite, value.to(own) * samples, 0.0)
        self._set_value("measured", 1)

    def step(self, now: int, share: float) -> None:
        """End an optimizer step, the number ``now``, and with it perhaps a window."""
        if not self._value("measured") or self.is_given:
            return
        self._set_value("measured", 0)
        self._set_value("steps", self.steps_measured + 1)
        if self.steps_measured % WINDOW:
            return
        penalty, losses = float(self.penalty), float(self.losses)
        if not (penalty > 0 and losses > 0):  # it goes on: heads that begin at zero have no distance yet
            return
        wanted = share * losses / penalty
        if self.first_step < 0:
            most = max(share, 1.0) if self.of_heads_alone else share
            self._set_value("limit", most * losses / penalty)
            self._set_value("acts_from", now + 1)
            logger.info("strength=%.4g makes the penalty %g times the task losses.", wanted, share)
        self._set_value("strength", min(wanted, self._value("limit")))
        for name in ("penalty", "losses", "steps"):
            self._set_value(name, 0)

    def take(self, strength: float, first_step: int) -> None:
        """Keep a strength from now on. Warm-up goes on, or counts from the first step that is given."""
        self._set_value("strength", strength)
        self._set_value("given", 1)
        if self.first_step < 0:
            self._set_value("acts_from", first_step)

    def describe(self, acting: str, share: float) -> str:
        """Say what it does, for a person."""
        if self.is_given:
            return f"{acting}, as was set"
        aim = f"{share:g} times the task losses"
        if self.first_step >= 0:
            return f"{acting}, which holds the penalty at {aim}"
        return (
            f"0, until {WINDOW} optimizer steps were measured, {self.steps_measured} so far; then the penalty is {aim}"
        )

    def restart(self) -> None:
        """Forget everything."""
        for name in self._buffers:
            self._set_value(name, -1 if name == "acts_from" else 0)


def strength_advice(balanced: float) -> str:
    """Say what to pass instead, from the strength at which the penalty is as large as the task losses."""
    low, high = (f"{share * balanced:.2g}" for share in USEFUL_SHARES)
    useful = f"{USEFUL_SHARES[0]:g} to {USEFUL_SHARES[1]:g}"
    return f"Shares of {useful} have been useful: pass strength='auto', or strength={low} to {high}."


def ramp(steps: int, warmup_steps: int) -> float:
    """Return 0 before the penalty acts (``steps < 0``), then a linear rise over ``warmup_steps``, then 1."""
    return 0.0 if steps < 0 else min(1.0, (steps + 1) / max(warmup_steps, 1))


class HasStrength(StateModule):
    """What the strength of a penalty is, and what it is in the present optimizer step."""

    automatic_strength: AutomaticStrength | None
    _options: Options
    _report: SaliencyReport | None

    @property
    def strength(self) -> float:
        """Factor of the penalty after warm-up; that of now, if it is automatic. A number can be set at any time."""
        auto = self.automatic_strength
        return float(self._options.strength) if auto is None else auto.value

    @strength.setter
    def strength(self, value: float | str) -> None:
        if self.automatic_strength is not None and value == AUTO:
            self.automatic_strength.restart()
        elif self.automatic_strength is not None:
            self.automatic_strength.take(non_negative_number("strength", value), self._options.start_step)
        else:
            self._options = replace(self._options, strength=non_negative_number("strength", value))
        self._strength_changes()

    @property
    def share(self) -> float | None:
        """At what share of the task losses ``strength="auto"`` holds the penalty; ``None`` for a number."""
        auto = self.automatic_strength
        return None if auto is None or auto.is_given else self._options.share

    @property
    def current_strength(self) -> float:
        """The factor in the present optimizer step: 0 at first, then a linear rise, then ``strength``."""
        steps, auto = self._steps_so_far(), self.automatic_strength
        first = self._options.start_step if auto is None else auto.first_step
        return self.strength * ramp(steps - first, self._options.warmup_steps)

    def _steps_so_far(self) -> int:
        raise NotImplementedError

    def _strength_of_relations(self) -> float:
        """What rules that follow the gradient of the loss are given: free of the scale of the losses, where it is found."""
        auto, share = self.automatic_strength, self.share
        if auto is None or share is None:
            return self.current_strength
        return share * ramp(self._steps_so_far() - auto.first_step, self._options.warmup_steps) * (auto.first_step >= 0)

    def _strength_in_words(self) -> str:
        steps, latest = self._steps_so_far(), None if self._report is None else self._report.share
        found = f"{self.current_strength:g} in optimizer step {steps}, {self.strength:g} after warm-up"
        if self.automatic_strength is not None and self._options.share is not None:
            found = self.automatic_strength.describe(found, self._options.share)
        return found if latest is None else f"{found}; {latest:.3g} times the task losses in the latest call"

    def _strength_changes(self, *, stepped: bool = False) -> None:
        """For derived classes: the strength is, or may become, another one."""


def whole_penalty(joined: Joined, relations: Tensor, factor: float) -> Tensor:
    """The penalty of the joined batch at a strength of ``factor``."""
    return factor * (relations.to(joined.distances) * joined.distances).triu(1).sum()


def own_penalty(distances: Tensor, relations: Tensor, joined: Joined, present: Sequence[int], factor: float) -> Tensor:
    """``factor * sum_{i<j} w_ij D_ij`` over the tasks that ran, with the factors of this process."""
    if factor == 0:
        return distances.new_zeros(())  # also where distances are not finite
    weights = relations if joined.factors is None else relations * joined.factors.to(relations)
    if len(present) < len(relations):
        places = places_in(joined.tasks, present)
        weights = weights[places][:, places]
    return factor * (weights.to(distances.dtype) * distances).triu(1).sum()
