"""The kinds of gradient surgery that methods have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saliency_reg import PCGrad

from ..runtime.errors import need


@dataclass(frozen=True)
class Surgery:
    """One kind of gradient surgery.

    Attributes:
        label: for people.
        weighting: from the seed of a training to a weighting; a function that has a name, so that it reaches workers.
        on_parameters: on the parameters of the backbone; otherwise at the feature map that the heads share.
    """

    label: str
    weighting: Callable[[int], Any]
    on_parameters: bool = False


def mgda(seed: int) -> Any:
    """Weights of the shortest convex combination of the gradients (Sener and Koltun 2018)."""
    del seed  # it draws nothing
    return need("torchjd.aggregation").MGDAWeighting()


def mgda_of_unit_gradients(seed: int) -> Callable[[Tensor], Tensor]:
    """Weights of the shortest convex combination of unit gradients: an option of their code that is not in the paper."""
    weighting = mgda(seed)

    def weights(gramian: Tensor) -> Tensor:
        lengths = gramian.diagonal().sqrt()  # never zero: tasks without a gradient do not come here
        found: Tensor = weighting(gramian / lengths / lengths.unsqueeze(1))
        return found

    return weights


PCGRAD = Surgery("PCGrad (feature)", PCGrad)
PCGRAD_PARAMETERS = Surgery("PCGrad (parameters)", PCGrad, on_parameters=True)
#: At the feature map, where it gives most to the smallest gradient.
MGDA_UB = Surgery("MGDA-UB", mgda)
MGDA_UB_UNIT = Surgery("MGDA-UB, unit gradients", mgda_of_unit_gradients)
