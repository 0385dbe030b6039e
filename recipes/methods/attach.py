"""What a method adds to the plain training step: the saliency regularizer, gradient surgery, both, or nothing."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, ParameterSurgery, RelationWeights, SaliencyRegularizer

from ..runtime.errors import CheckpointMismatchError
from .methods import Method
from .surgeries import Surgery

#: Of the ``entropic`` rule, where none is given: the library's when the tables in docs/ were trained.
TEMPERATURE = 0.3


def attach(
    method: Method,
    model: nn.Module,
    tasks: Sequence[str],
    optimizer: torch.optim.Optimizer,
    *,
    strength: float,
    share: float | str | None = None,
    batch_size: int,
    seed: int,
    temperature: float | None = None,
    channel_axis: int | None = None,
    process_group: Any = None,
) -> Backward:
    """Attach what the method adds to a plain step to a model.

    Args:
        method: which.
        model: with a ``backbone`` and ``heads``, a module for each task or one ``Linear`` with a column for each.
        tasks: of the heads.
        optimizer: of the training.
        strength: of the penalty, for a mean over the batch.
        share: in place of the strength: at which the penalty is held, of the losses.
        batch_size: of a whole step; the authors' penalty is summed over the batch, and divided by it here.
        seed: of the order of PCGrad.
        temperature: of the ``entropic`` rule, by default ``TEMPERATURE``; a method that is not tuned has the library's.
        channel_axis: of the feature map, if it is not the usual one.
        process_group: of surgery and relations.
    """

    def regularizer(surgery: Any) -> SaliencyRegularizer:
        common: dict[str, Any] = {
            "heads": "heads",
            # One linear layer is a head with a column for each task.
            "tasks": tasks if isinstance(getattr(model, "heads", None), nn.Linear) else None,
            "optimizer": optimizer,
            "process_group": process_group,
            "surgery": surgery,
            "channel_axis": channel_axis,
            **method.saliency,
        }
        if not method.tuned:
            return by_share(SaliencyRegularizer, model, share, **common)
        if method.rule == "authors" and method.metric == "l1":  # their conventions; otherwise their rule alone
            if share is not None:
                return by_share(SaliencyRegularizer.authors, model, share, **common)
            return SaliencyRegularizer.authors(model, strength=strength / batch_size, **common)
        relations: str | RelationWeights = method.rule or "fixed"
        if method.rule == "entropic":
            relations = RelationWeights(len(tasks), "entropic", temperature=temperature or TEMPERATURE)
        if share is not None:
            return by_share(SaliencyRegularizer, model, share, metric=method.metric, relations=relations, **common)
        return SaliencyRegularizer(model, strength=strength, metric=method.metric, relations=relations, **common)

    build = None if method.rule is None else regularizer
    return Backward(model, "heads", tasks, optimizer, method.surgery, build, seed, process_group=process_group)


def by_share(
    build: Callable[..., SaliencyRegularizer], model: nn.Module, share: float | str | None, **options: Any
) -> SaliencyRegularizer:
    """A regularizer that holds its penalty at a share of the losses, which each call has to give.

    A ``share`` in words is the package's own choice.
    """
    return build(model, strength="auto", share=None if isinstance(share, str) else share, **options)


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
    ) -> None:
        self._tasks = tuple(tasks)
        self.regularizer: SaliencyRegularizer | None = None
        self.on_parameters: ParameterSurgery | None = None
        self.at_feature: FeatureSurgery | None = None
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
    ) -> None:
        """Add the gradients of the losses, one for each task, and of the penalty if there is one, to ``.grad``.

        Args:
            losses: one for each task, 0-dim.
            share: of the samples of this micro-batch in those of the optimizer step, in all processes.
            accumulate: more micro-batches follow.
            accelerator: an ``accelerate.Accelerator``, whose loss scale is to be used.
            arguments: of the regularizer's call.
        """
        penalty = None
        if self.regularizer is not None:
            penalty = self.regularizer(**(arguments or {}))
            if share != 1.0 and self.regularizer.reduction == "mean":  # sums over micro-batches add up
                penalty = share * penalty
        if self.on_parameters is not None:
            scaler = None if accelerator is None else accelerator.scaler
            scaled = (lambda loss: loss) if scaler is None else scaler.scale
            own = {task: scaled(loss) for task, loss in zip(self._tasks, losses)}
            self.on_parameters.backward(own, None if penalty is None else scaled(penalty), accumulate=accumulate)
            return
        total = losses.sum() if isinstance(losses, Tensor) else torch.stack(list(losses)).sum()
        if penalty is not None:
            total = total + penalty
        if accelerator is None:
            total.backward()
        else:
            accelerator.backward(total)

    @property
    def averages_itself(self) -> bool:
        """Whether gradients are averaged over the processes here: then the model must not be wrapped to do so, too."""
        return self.on_parameters is not None

    @property
    def relations(self) -> list[list[float]] | None:
        """Relation weights of now, if there is a regularizer."""
        return None if self.regularizer is None else self.regularizer.relations.matrix().tolist()

    @property
    def attached(self) -> dict[str, SaliencyRegularizer | FeatureSurgery | ParameterSurgery]:
        """What was attached to the model, by the name that it has in a checkpoint."""
        found = {
            "regularizer": self.regularizer,
            "feature_surgery": self.at_feature,
            "parameter_surgery": self.on_parameters,
        }
        return {name: part for name, part in found.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """Relations, counts and orders of everything that was attached."""
        return {name: part.state_dict() for name, part in self.attached.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken.

        Raises:
            CheckpointMismatchError: of another kind of method.
            SaliencyRegError: of other tasks.
        """
        attached = self.attached
        if set(state) != set(attached):
            raise CheckpointMismatchError(
                f"the checkpoint was saved with {sorted(state) or 'nothing'} attached to the model, but here it is "
                f"{sorted(attached) or 'nothing'}. Choose the same method, or another folder."
            )
        for name, part in attached.items():
            part.load_state_dict(state[name])
