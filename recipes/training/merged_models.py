"""The best of the models that single-task models can be merged into."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..models.architectures.hard_sharing import HardSharing
from ..models.architectures.single_task import SingleTask, merged

#: Of the sum of the task vectors, tried beside their mean; 0.3 is what task arithmetic begins with (Ilharco et al. 2023).
SCALINGS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
#: Score and loss on the validation split.
Validation = tuple[float, float]


def best_merged(
    single_tasks: SingleTask, initial: Mapping[str, Tensor], validate: Callable[[HardSharing], Validation]
) -> tuple[HardSharing, Validation]:
    """Merge with each scaling, and keep the one of the highest score, with its score and loss.

    Args:
        single_tasks: trained.
        initial: weights that their backbones began with.
        validate: a model to its score, where more is better, and its loss, where less is.
    """
    found = []
    for scaling in sorted({1 / len(single_tasks.tasks), *SCALINGS}):
        model = merged(single_tasks, initial, scaling)
        found.append((model, validate(model)))
    return max(found, key=lambda own: (own[1][0], -own[1][1]))
