"""Views of several trainings beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ...errors import ConfigurationError, TaskError, WrongTypeError
from .ranks import rank_correlations_of, spearman
from .relation_views import RelationViews


@dataclass(frozen=True, eq=False)
class ViewComparison:
    """Rank correlations between views, over trainings that differ in their seeds.

    Attributes:
        views: the keys of the V views.
        trainings: how many there were.
        mean: ``[V, V]``, of the rank correlation between two views of the same training; over the trainings in which there
            is one.
        std: ``[V, V]``, its standard deviation (by n - 1) over these; NaN with fewer than two.
        over_seeds: ``[V]``, mean rank correlation of a view with itself in another training: nothing that a view says is
            more certain than that. NaN with one training.
    """

    views: tuple[str, ...]
    trainings: int
    mean: Tensor
    std: Tensor
    over_seeds: Tensor


def compare_views(trainings: Sequence[RelationViews]) -> ViewComparison:
    """Compare the views of several trainings on the same tasks, in any order.

    Raises:
        WrongTypeError, TaskError: no list of :class:`RelationViews`, or trainings on other tasks.
        ConfigurationError: no training, or trainings with other views.

    Example:
        >>> cosines = torch.tensor([[1, 0.8, -0.2], [0.8, 1, 0], [-0.2, 0, 1]])
        >>> views = RelationViews(("a", "b", "c"), {"gradient_cosine": cosines}, torch.full((3, 3), 9))
        >>> compare_views([views, views.subset(["c", "a", "b"])]).over_seeds.tolist()
        [1.0]
    """
    if not isinstance(trainings, Sequence) or not all(isinstance(own, RelationViews) for own in trainings):
        raise WrongTypeError("trainings must be a list of RelationViews. Pass [views] for one.")
    if not trainings:
        raise ConfigurationError("trainings is empty. Pass the views of at least one training.")
    first = trainings[0]
    for own in trainings:
        if {*own.tasks} != {*first.tasks}:
            raise TaskError(
                f"trainings have different tasks: {list(first.tasks)} and {list(own.tasks)}. Use views.subset([...])."
            )
        if [*own] != [*first]:
            raise ConfigurationError(f"trainings have different views: {[*first]} and {[*own]}. Compare those alike.")
    values = [own.subset(first.tasks).pair_values() for own in trainings]
    found = torch.stack([rank_correlations_of(vectors) for vectors in values])
    known = (~found.isnan()).sum(0)
    mean = found.nanmean(0)
    squares = (found - mean).square().nansum(0)
    std = torch.where(known > 1, (squares / (known - 1).clamp(min=1)).sqrt(), torch.nan)
    again = [
        found.new_tensor([spearman(one[view], other[view]) for one, other in combinations(values, 2)]).nanmean()
        for view in range(len(first.matrices))
    ]
    over_seeds = torch.stack(again) if again else torch.empty(0, dtype=torch.float64)
    return ViewComparison(tuple(first), len(trainings), mean, std, over_seeds)
