"""GradNorm at the feature map: task weights that are learned from gradient lengths and losses, in the one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Union

import torch
from torch import Tensor, nn

from ...capture import ColumnsChoice, FeatureChoice, HeadsChoice, Item
from ...errors import (
    ConfigurationError,
    MissingArgumentError,
    ShapeError,
    StateMismatchError,
    SurgeryError,
    WrongTypeError,
)
from ...tasks import Losses, losses_per_task, per_task
from ...torch_tools import (
    Gradient,
    Hook,
    StepHook,
    check_not_closure_only,
    names_from_bytes,
    names_to_bytes,
    non_negative_number,
    positive_number,
    this_pass,
    unwrap_optimizer,
    warn_user,
)
from .combiner import TaskGradients
from .feature_surgery import FeatureSurgery
from .fork import noted
from .forked_aliases import CarriedFork
from .loss_balance import LossBalance
from .penalty_bypass import joining_collectives

#: Backward passes without an optimizer step after which the user is told.
PASSES = 100
_NO_STEP = (
    f"the weights of GradNorm have not moved in {PASSES} backward passes: no step of an attached optimizer was seen. That "
    "is right if you accumulate so many batches. Pass optimizer=..., call .attach_optimizer(optimizer) if you made a new "
    "one, or call .step() after each update."
)
_NOT_GIVEN = (
    "GradNorm compares how fast the losses fall, and was not given {what} in this backward pass. Call "
    "loss = gradnorm(losses) with all task losses, and loss.backward(). Take gradients for something else within "
    "'with gradnorm.passing():'."
)


class GradNorm(FeatureSurgery):
    r"""GradNorm (Chen et al., ICML 2018) at the feature map that the heads share, within an ordinary ``loss.backward()``.

    Each task has a weight ``w_t``, at first 1, and ``sum_t w_t dL_t/dA`` goes on from the heads to the backbone. After each
    optimizer step the weights are moved: with ``G_t = w_t |dL_t/dA|``, its mean ``M`` over the tasks, and the
    relative inverse training rate ``r_t``, which is ``L_t / L_t(0)`` divided by its mean, the objective is
    ``sum_t |G_t - M r_t^a|``, with a constant target, and the weights are scaled such that they add up to T (their
    algorithm 1). Lengths come from the Gramian at the fork: there is no further backward pass.

    Where it differs from the paper:

    - ``G_t`` is taken at the feature map, not on the weights of the last shared layer, and heads keep their plain
      gradients: ``w_t`` acts on what is shared.
    - A step multiplies each weight by ``exp(+-learning_rate)``, against the sign of the derivative of the objective, where
      the paper adds a multiple of the derivative, which is ``+-|dL_t/dA|``: at the start that is the same for lengths of
      1. So a loss scale, or a factor of all losses, changes nothing, weights stay positive, and one that has to become
      0.01, of a gradient that is 100 times as long as the others', is not thrown back by a step of 1.
    - A task without a gradient in a step takes no part in it, and keeps its weight: means are over those that have one,
      whose weights keep their sum.

    Micro-batches of an accumulation count as one batch, if their losses are divided by their number, as ever. In several
    processes lengths are those of the joined batch. The loss of a task is its mean over the micro-batches and the processes
    that have one, so that its rate does not depend on how many have labels; a loss of exactly 0 counts as none. What a step
    that GradScaler skips had brought counts to the next one, unless it was not finite.

    Args:
        model, heads, tasks, columns, feature, output, channel_axis, process_group: as in :class:`FeatureSurgery`.
        optimizer: after whose steps the weights move; without one call :meth:`step`. Not LBFGS.
        asymmetry: the power of the training rates ``a >= 0``: the paper takes 1.5 for tasks that differ much, and 0.12 for
            tasks that are alike; 0 for equal lengths.
        learning_rate: of the weights, ``> 0``; the paper takes 0.025.
        initial_losses: ``L_t(0)``, numbers ``> 0`` for each task, where a first batch tells too little: ``log K`` of a
            cross-entropy. By default the losses in the first step in which a task has a gradient.

    Raises:
        SaliencyRegError: one of its kinds, for arguments that cannot work; the model is then left as it was.

    Example:
        >>> import torch
        >>> model = nn.ModuleDict({"backbone": nn.Linear(8, 4), "heads": nn.ModuleDict()})
        >>> for task in ("smiling", "young"):
        ...     model["heads"][task] = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> gradnorm = GradNorm(model, heads="heads", optimizer=optimizer)
        >>> feature = model["backbone"](torch.randn(16, 8))
        >>> losses = {task: head(feature).square().mean() for task, head in model["heads"].items()}
        >>> loss = gradnorm(losses)
        >>> loss.backward()
        >>> optimizer.step()
        >>> round(gradnorm.weights.sum().item(), 6)
        2.0
    """

    weighting: LossBalance
    task_names: Tensor
    _step_hook: StepHook | None = None
    #: Of a backward pass: its number, and ``[3, T]``: losses by their factor, 1 for a task with one, and that factor
    #: where the loss is not 0.
    _noted: tuple[int, Tensor] | None = None
    in_a_copy: ClassVar[dict[str, Any]] = {"_step_hook": None, "_noted": None}

    def __init__(
        self,
        model: nn.Module,
        heads: HeadsChoice = None,
        *,
        tasks: Sequence[str] | None = None,
        optimizer: Any = None,
        asymmetry: float = 1.5,
        learning_rate: float = 0.025,
        initial_losses: Mapping[str, float] | Sequence[float] | None = None,
        feature: FeatureChoice = None,
        output: Item | Mapping[str, Item | None] | None = None,
        channel_axis: int | None = None,
        columns: ColumnsChoice = None,
        process_group: Any = None,
    ) -> None:
        power = non_negative_number("asymmetry", asymmetry)
        rate = positive_number("learning_rate", learning_rate)
        super().__init__(
            model,
            heads,
            weighting=_placeholder,
            tasks=tasks,
            feature=feature,
            output=output,
            channel_axis=channel_axis,
            columns=columns,
            optimizer=optimizer,
            process_group=process_group,
        )
        try:
            self.weighting = LossBalance(len(self.tasks), power, rate, self._checked_initial_losses(initial_losses))
        except Exception:
            self.remove()
            raise
        self._passes = 0
        self.register_buffer("task_names", names_to_bytes(self.tasks))
        if optimizer is not None:
            self.attach_optimizer(optimizer)

    # What a training loop calls.

    def forward(self, losses: Union[Losses, Tensor]) -> Tensor:
        """Return the sum of the losses, whose backward pass weighs the task gradients.

        In distributed runs every process has to call it, also without any loss: ``gradnorm({})``.

        Args:
            losses: ``{task: 0-dim loss}``, which may leave tasks out, a sequence of T, or a tensor ``[T]``; ``>= 0``, with
                your loss weights in them. A task without labels has no loss, or one of 0 without a gradient.

        Raises:
            TaskError, WrongTypeError, ShapeError: losses that are too few, unknown, no tensors, or not 0-dim.
            SurgeryError: in the backward pass, for a task gradient without a loss.
            ConfigurationError: in the backward pass, for a loss below 0, whose rate means nothing.
        """
        if isinstance(losses, Tensor) and losses.ndim == 1:
            losses = list(losses.unbind())
        found = losses_per_task(losses, self.tasks)
        for task, loss in found.items():
            _check_scalar(loss, self.tasks[task])
        device = next(
            (loss.device for loss in found.values()), None if self._capture is None else self._capture.device()
        )
        total = sum(found.values(), start=torch.zeros((), device=device))
        if not torch.is_grad_enabled():
            return total
        if self._capture is None:
            raise SurgeryError("this is a copy, which belongs to no model. Build GradNorm with the copied model.")
        carried: CarriedFork = self._capture.aliases.end_forward()
        total = joining_collectives(total, carried, self)
        if not total.requires_grad:
            return total
        nothing = torch.zeros_like(total)
        rows = torch.stack([found[task].detach().to(nothing) if task in found else nothing for task in self._indices])
        known = torch.tensor([float(task in found) for task in self._indices])
        rows = torch.stack([rows, known.to(rows), rows.ne(0).to(rows)])
        return noted(total, Hook(self._note, rows))

    def step(self) -> None:
        """Move the weights by what the backward passes since the latest step have brought, where no optimizer does it."""
        self._passes = 0
        self.weighting.update()

    def attach_optimizer(self, optimizer: Any) -> None:
        """Move the weights after this optimizer's steps (and no longer after those of an earlier one).

        Wrappers that carry it as ``.optimizer`` are unwrapped. A step that GradScaler skips does not count.

        Raises:
            WrongTypeError: no optimizer.
            ConfigurationError: an optimizer that evaluates a closure several times per step (LBFGS).
        """
        inner = unwrap_optimizer(optimizer)
        check_not_closure_only(inner)
        if self._step_hook is not None:
            self._step_hook.remove()
        self._step_hook = StepHook(inner, self.step)

    @property
    def follows_optimizer(self) -> bool:
        """Whether the weights move with the steps of an attached optimizer."""
        return self._step_hook is not None

    @property
    def weights(self) -> Tensor:
        """``[T]``, those of the next backward pass: positive, with the sum T."""
        return self.weighting.weights.clone()

    def remove(self) -> None:
        """Take everything off the model and the optimizer. Weights and report stay readable."""
        super().remove()
        if self._step_hook is not None:
            self._step_hook.remove()
            self._step_hook = None

    # What the fork asks.

    def combine(self, gradients: TaskGradients, totals: Sequence[Gradient]) -> list[Gradient] | None:
        """Weigh with the weights of now, and take up lengths and losses."""
        here = self._losses_of_this_pass()
        if here is None and gradients.any_here and self.ranks.size == 1:
            raise SurgeryError(_NOT_GIVEN.format(what="any loss"))
        weighed = super().combine(gradients, totals)
        if weighed is None or self.report is None:
            return weighed
        norms = self.report.gramian.diagonal()
        rows = norms.new_zeros(3, len(norms)) if here is None else here.to(norms)
        # Gradients are averaged over the processes, and so are losses and their factors.
        rows = self.ranks.add(rows.clone()) / self.ranks.size
        found = torch.cat([norms.unsqueeze(0), rows]).cpu()  # a device is waited for once
        self._check(*found[:3])
        self.weighting.add(found[0], found[1], found[3])
        self._passes += 1
        if self._passes == PASSES:
            warn_user(_NO_STEP)
        return weighed

    def _note(self, rows: Tensor, gradient: Gradient) -> None:
        if gradient is None:
            return
        now, factor = this_pass(), gradient.detach().to(rows)
        rows = rows * torch.stack([factor, torch.ones_like(factor), factor]).unsqueeze(1)
        if self._noted is not None and self._noted[0] == now:
            rows = rows + self._noted[1].to(rows)
        self._noted = now, rows

    def _losses_of_this_pass(self) -> Tensor | None:
        if self._noted is None or self._noted[0] != this_pass():
            return None
        number, rows = self._noted
        self._noted = number, rows * rows.new_tensor([[0], [1], [0]])  # through several forwards, they count once
        return rows

    @property
    def _indices(self) -> range:
        return range(len(self.tasks))

    def _check(self, norms: Tensor, losses: Tensor, known: Tensor) -> None:
        if without := [
            task for task, one, other in zip(self.tasks, norms.tolist(), known.tolist()) if one > 0 and not other
        ]:
            raise SurgeryError(_NOT_GIVEN.format(what=f"the loss of {without}"))
        if below := [task for task, loss in zip(self.tasks, losses.tolist()) if loss < 0]:
            raise ConfigurationError(
                f"the loss of {below} is below 0, so that the rate at which it falls, L / L(0), means nothing. Use losses "
                ">= 0 (add a lower bound), or weigh the gradients alone: FeatureSurgery."
            )

    def _checked_initial_losses(self, given: Any) -> list[float] | None:
        if given is None:
            return None
        found = per_task(given, self.tasks, "initial_losses")
        if missing := [task for index, task in enumerate(self.tasks) if index not in found]:
            raise MissingArgumentError(f"initial_losses has no number for {missing}. Give one for each task, or none.")
        return [positive_number(f"initial_losses[{self.tasks[index]!r}]", loss) for index, loss in found.items()]

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Also refuse the state of other tasks, to whose positions the weights belong."""
        saved = state_dict.get(prefix + "task_names")
        if isinstance(saved, Tensor) and saved.ndim == 1 and not saved.is_meta:
            names = names_from_bytes(saved)
            if names != list(self.tasks):
                raise StateMismatchError(
                    f"the state dict was saved for the tasks {names}, but this GradNorm has {list(self.tasks)}. Build it "
                    "with the same tasks in the same order. Nothing was loaded."
                )
        super().check_loaded(state_dict, prefix)

    def __repr__(self) -> str:
        heads = "attached to no model" if self._capture is None else f"heads {self._capture.describe()[0]}"
        balance = self.weighting
        return f"GradNorm(asymmetry={balance.asymmetry:g}, learning_rate={balance.learning_rate:g}, {heads})"


def _placeholder(gramian: Tensor) -> Tensor:
    """Stands in for the weighting until the number of tasks is known."""
    return torch.ones_like(gramian.diagonal())


def _check_scalar(loss: object, task: str) -> None:
    if not isinstance(loss, Tensor):
        raise WrongTypeError(
            f"the loss of task {task!r} must be a 0-dim tensor with its graph, found {type(loss).__name__}."
        )
    if loss.ndim > 0:
        raise ShapeError(
            f"the loss of task {task!r} has the shape {list(loss.shape)}, expected a 0-dim tensor. Use .mean() or .sum() "
            "over the batch."
        )
