"""What a method does in place of ``loss.backward()``: surgery, penalties, weights of the losses, or nothing."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, GradNorm, HeadPenalty, ParameterSurgery, RepMTL, SaliencyRegularizer

from ..runtime.errors import CheckpointMismatchError
from .loss_weightings import LossWeights
from .reshaping import Reshaping
from .surgeries import Surgery

#: Losses of single samples: ``[T, b]``, or T tensors ``[b]``; and their weights ``[T, b]``, if some have none.
SampleLosses = tuple[Tensor | Sequence[Tensor], Tensor | None]
Attached = SaliencyRegularizer | FeatureSurgery | ParameterSurgery | HeadPenalty | RepMTL


class Backward:
    """Takes the place of ``loss.backward()``, for every kind of method.

    Args:
        model: has a ``backbone`` that the heads share, where there is surgery.
        heads: name of the heads, or of one head with a column per task.
        tasks: their names.
        optimizer: of the training.
        surgery: the kind of surgery, if any.
        regularizer: builds the saliency regularizer with this ``surgery=``; ``None`` for a method without one.
        seed: of the order of PCGrad.
        process_group: of the surgery, in several processes; by default new ones over all of them.
        shared: what surgery on parameters is about.
        gradnorm: in place of a surgery.
        head_penalty, rep_mtl, weight_penalty: further penalties, the last one with its strength.
        loss_weighting: from the losses ``[T]`` of the tasks, and which have labels, to one loss; by default their sum.
        splittable: whether it may be called with the losses of a part of a step.
        after: of a ``"step"`` or an ``"epoch"``, when it learns.
        reshaping: changes model and optimizer between epochs.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: str,
        tasks: Sequence[str],
        optimizer: torch.optim.Optimizer,
        surgery: Surgery | None,
        regularizer: Callable[[Any], SaliencyRegularizer] | None,
        seed: int,
        *,
        process_group: Any = None,
        shared: str = "backbone",
        gradnorm: GradNorm | None = None,
        head_penalty: HeadPenalty | None = None,
        rep_mtl: RepMTL | None = None,
        weight_penalty: Callable[[], Tensor] | None = None,
        loss_weighting: LossWeights | None = None,
        splittable: bool = True,
        after: str = "",
        reshaping: Reshaping | None = None,
    ) -> None:
        self._tasks = tuple(tasks)
        self._head_penalty = head_penalty
        self._rep_mtl = rep_mtl
        self._weight_penalty = weight_penalty
        self.loss_weighting = loss_weighting
        self._splittable = splittable
        self._after = after
        self.reshaping = reshaping
        self.regularizer: SaliencyRegularizer | None = None
        self.on_parameters: ParameterSurgery | None = None
        self.at_feature: FeatureSurgery | None = gradnorm
        weighting: Any = None
        if surgery is not None and surgery.on_parameters:
            # Named, because behind one head with a column per task every loss seems to depend on the whole head.
            self.on_parameters = ParameterSurgery(
                model,
                surgery.weighting(seed),
                tasks=tasks,
                shared=shared,
                optimizer=optimizer,
                process_group=process_group,
            )
        elif surgery is not None:
            weighting = surgery.weighting(seed)
        if regularizer is not None:
            self.regularizer = regularizer(weighting)
        elif weighting is not None:
            self.at_feature = FeatureSurgery(
                model, heads=heads, tasks=tasks, weighting=weighting, optimizer=optimizer, process_group=process_group
            )

    def __call__(
        self,
        losses: Sequence[Tensor] | Tensor,
        *,
        share: float = 1.0,
        accumulate: bool = False,
        accelerator: Any = None,
        arguments: Mapping[str, Any] | None = None,
        samples: SampleLosses | None = None,
        known: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Add the gradients of the losses, one for each task, and of the penalty if there is one, to ``.grad``.

        Args:
            losses: one for each task, 0-dim.
            share: of the samples of this micro-batch in those of the optimizer step, in all processes.
            accumulate: more micro-batches follow.
            accelerator: an ``accelerate.Accelerator``, whose loss scale is to be used.
            arguments: of the regularizer's call.
            samples: losses of single samples, for penalties on their saliency.
            known: ``[T]``, whether a task has labels in this step; by default all have.
            labels: ``[b, T]``, NaN for missing ones, for a method that :attr:`observes`.
        """
        if self.reshaping is not None and labels is not None:
            self.reshaping.observe(labels)
        penalty = self._penalty(share, arguments or {}, samples)
        if self.on_parameters is not None:
            scaler = None if accelerator is None else accelerator.scaler
            scaled = (lambda loss: loss) if scaler is None else scaler.scale
            own = {task: scaled(loss) for task, loss in zip(self._tasks, losses)}
            self.on_parameters.backward(own, None if penalty is None else scaled(penalty), accumulate=accumulate)
            return
        stacked = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
        if self.loss_weighting is not None:
            present = torch.ones(len(stacked), dtype=torch.bool) if known is None else known
            total = self.loss_weighting(stacked, present.to(stacked.device))
        else:
            total = self.at_feature(stacked) if isinstance(self.at_feature, GradNorm) else stacked.sum()
        if penalty is not None:
            total = total + penalty
        if accelerator is None:
            total.backward()
        else:
            accelerator.backward(total)

    def _penalty(self, share: float, arguments: Mapping[str, Any], samples: SampleLosses | None) -> Tensor | None:
        """All penalties of this micro-batch."""
        found: list[Tensor] = []
        if self.regularizer is not None:
            own = self.regularizer(**arguments)
            # Sums over micro-batches add up.
            found.append(share * own if self.regularizer.reduction == "mean" else own)
        if self._head_penalty is not None:
            found.append(share * self._head_penalty())
        if self._weight_penalty is not None:
            found.append(share * self._weight_penalty())
        if self._rep_mtl is not None and samples is not None:
            losses, weights = samples
            if weights is not None:
                losses = [own * known.to(own) for own, known in zip(losses, weights)]
            found.append(share * self._rep_mtl(losses=dict(zip(self._tasks, losses))))
        return sum(found[1:], found[0]) if found else None

    @property
    def averages_itself(self) -> bool:
        """Whether gradients are averaged over the processes here: then the model must not be wrapped to do so, too."""
        return self.on_parameters is not None

    @property
    def observes(self) -> bool:
        """Whether calls need the labels."""
        return self.reshaping is not None and self.reshaping.observes

    @property
    def learns_from_steps(self) -> bool:
        """Whether :meth:`after_step` has to be called."""
        return self._after == "step"

    def after_step(self, losses: Tensor | Sequence[Tensor]) -> None:
        """Take the losses ``[T]`` of the same batch after the optimizer step."""
        if self.loss_weighting is not None:
            self.loss_weighting.after_step(losses if isinstance(losses, Tensor) else torch.stack(list(losses)))

    def after_epoch(self) -> None:
        """Note the end of an epoch."""
        if self.loss_weighting is not None and self._after == "epoch":
            self.loss_weighting.after_epoch()

    @property
    def needs_whole_steps(self) -> bool:
        """Whether the losses that are weighed must be those of all samples of a step."""
        return not self._splittable

    @property
    def relations(self) -> list[list[float]] | None:
        """Relation weights of now, if there is a regularizer."""
        return None if self.regularizer is None else self.regularizer.relations.matrix().tolist()

    @property
    def attached(self) -> dict[str, Attached]:
        """What was attached to the model, by the name that it has in a checkpoint."""
        found = {
            "regularizer": self.regularizer,
            "feature_surgery": self.at_feature,
            "parameter_surgery": self.on_parameters,
            "head_penalty": self._head_penalty,
            "rep_mtl": self._rep_mtl,
        }
        return {name: part for name, part in found.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Relations, counts and orders of everything that was attached."""
        return {name: part.state_dict() for name, part in self._with_state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken.

        Raises:
            CheckpointMismatchError: of another kind of method.
            SaliencyRegError: of other tasks.
        """
        attached = self._with_state
        if set(state) != set(attached):
            raise CheckpointMismatchError(
                f"the checkpoint was saved with {sorted(state) or 'nothing'} attached to the model, but here it is "
                f"{sorted(attached) or 'nothing'}. Choose the same method, or another folder."
            )
        for name, part in attached.items():
            part.load_state_dict(state[name])

    @property
    def _with_state(self) -> dict[str, Any]:
        others = {"loss_weighting": self.loss_weighting, "reshaping": self.reshaping}
        return {**self.attached, **{name: part for name, part in others.items() if part is not None}}

    def remove(self) -> None:
        """Take everything off the model."""
        for part in (*self.attached.values(), *([] if self.reshaping is None else [self.reshaping])):
            part.remove()
