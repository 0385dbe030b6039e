"""What a method adds to the plain training step: the saliency regularizer, gradient surgery, both, or nothing."""

# mypy: untyped-calls-exclude=torch

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saliency_reg import FeatureSurgery, ParameterSurgery, PCGrad, SaliencyRegularizer

from .extras import need

__all__ = ["MGDA_UB", "MGDA_UB_UNIT", "PCGRAD", "Backward", "Surgery"]


@dataclass(frozen=True)
class Surgery:
    """One kind of gradient surgery, under the name that all tables use."""

    label: str
    weighting: Callable[[int], Any]
    """From the seed of a training to a weighting."""
    on_parameters: bool = False
    """On the parameters of the backbone; otherwise at the feature map that the heads share."""


def _mgda(seed: int) -> Any:
    del seed  # it draws nothing
    return need("torchjd.aggregation").MGDAWeighting()


def _mgda_of_unit_gradients(seed: int) -> Callable[[Tensor], Tensor]:
    weighting = _mgda(seed)

    def weights(gramian: Tensor) -> Tensor:
        lengths = gramian.diagonal().sqrt()  # never zero: tasks without a gradient do not come here
        found: Tensor = weighting(gramian / lengths / lengths.unsqueeze(1))
        return found

    return weights


#: Part of a method's key to the surgery: two different methods.
PCGRAD = {
    "pcgrad_feature": Surgery("PCGrad (feature)", PCGrad),
    "pcgrad_parameters": Surgery("PCGrad (parameters)", PCGrad, on_parameters=True),
}
#: Sener and Koltun 2018: the weights are those of the shortest convex combination of the gradients at the feature map,
#: which gives most to the smallest gradient. An option of their code, not in the paper, takes the weights of the shortest
#: convex combination of unit gradients for the gradients as they are.
MGDA_UB = Surgery("MGDA-UB", _mgda)
MGDA_UB_UNIT = Surgery("MGDA-UB, unit gradients", _mgda_of_unit_gradients)


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
    ) -> None:
        self._tasks = tuple(tasks)
        self._regularizer: SaliencyRegularizer | None = None
        self._on_parameters: ParameterSurgery | None = None
        at_feature: Any = None
        if surgery is not None and surgery.on_parameters:
            # Named, because behind one head with a column per task every loss seems to depend on the whole head.
            self._on_parameters = ParameterSurgery(
                model, surgery.weighting(seed), tasks=tasks, shared="backbone", optimizer=optimizer
            )
        elif surgery is not None:
            at_feature = surgery.weighting(seed)
        if regularizer is not None:
            self._regularizer = regularizer(at_feature)
        elif at_feature is not None:
            # The model holds on to it.
            FeatureSurgery(model, heads=heads, tasks=tasks, weighting=at_feature, optimizer=optimizer)

    def __call__(self, losses: Sequence[Tensor] | Tensor) -> None:
        """Add the gradients of the losses, one for each task, and of the penalty if there is one, to ``.grad``."""
        penalty = None if self._regularizer is None else self._regularizer()
        if self._on_parameters is not None:
            self._on_parameters.backward(dict(zip(self._tasks, losses)), penalty)
            return
        total = losses.sum() if isinstance(losses, Tensor) else torch.stack(list(losses)).sum()
        if penalty is not None:
            total = total + penalty
        total.backward()

    @property
    def relations(self) -> list[list[float]] | None:
        """Relation weights of now, if there is a regularizer."""
        return None if self._regularizer is None else self._regularizer.relations.matrix().tolist()
