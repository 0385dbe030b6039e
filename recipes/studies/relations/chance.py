"""Whether a model tells anything of the labels: its scores beside those on labels in another order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...data.task_kinds import TaskKind, columns_of
from ...training.metrics import area_under_curve

#: Orders of the labels.
_ORDERS = 100
#: Standard deviations above chance from which on a score counts.
CLEAR = 2.0


def above_chance(outputs: Tensor, labels: Tensor, kinds: Mapping[str, TaskKind]) -> dict[str, list[float]]:
    """How far scores are above those on the same labels in another order, and how far these are apart.

    Args:
        outputs: ``[N, K]``, those of all tasks side by side.
        labels: ``[N, T]``, NaN where one is missing; rows keep their labels together when they are drawn anew.
        kinds: of the tasks. The score is AUC, accuracy, or Pearson's correlation of a number.

    Returns:
        ``"above"``: of each task its score minus the mean one by chance; ``"spread"``: the standard deviation of those by
        chance, NaN where there is no score; ``"mean"``: both, of the mean over the tasks that have a score.
    """
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(len(labels)), *(torch.randperm(len(labels), generator=generator) for _ in range(_ORDERS))]
    found = torch.tensor([_scores(outputs, labels[order], kinds) for order in orders], dtype=torch.float64)
    mean = found.nanmean(1)
    by_chance = found[1:]
    above = found[0] - by_chance.nanmean(0)
    spread = (by_chance - by_chance.nanmean(0)).square().nanmean(0).sqrt()
    return {
        "above": above.tolist(),
        "spread": spread.tolist(),
        "mean": [float(mean[0] - mean[1:].mean()), float(mean[1:].std())],
    }


def clear_of_chance(above: Sequence[float], spread: Sequence[float]) -> bool:
    """Whether the mean of scores of several trainings is clearly above chance; those that are not known count as chance.

    Args:
        above, spread: of each training.
    """
    known = [(one, wide) for one, wide in zip(above, spread) if math.isfinite(one) and math.isfinite(wide)]
    if not known:
        return False
    error = math.sqrt(sum(wide**2 for _, wide in known)) / len(known)
    return sum(one for one, _ in known) / len(known) > CLEAR * error


def _scores(outputs: Tensor, labels: Tensor, kinds: Mapping[str, TaskKind]) -> list[float]:
    found = []
    for kind, columns, truth in zip(kinds.values(), columns_of(kinds), labels.unbind(1)):
        known = ~torch.isnan(truth)
        own, true = outputs[known][:, columns], truth[known]
        if len(true) < 2 or not bool(torch.isfinite(own).all()):
            found.append(math.nan)
        elif kind.name == "binary":
            found.append(area_under_curve(own[:, 0], true))
        elif kind.name == "classes":
            found.append(float((own.argmax(1) == true.long()).double().mean()))
        else:
            found.append(float(torch.corrcoef(torch.stack([own[:, 0].double(), true.double()]))[0, 1]))
    return found
