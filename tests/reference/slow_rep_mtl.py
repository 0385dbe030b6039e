"""Rep-MTL as it is printed: every ``[C, C]`` matrix, for every sample and task, in plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: ``[sample][task]``, each ``[C, P]``; ``None`` where the task has no label.
Nested = Sequence[Sequence["Tensor | None"]]


def slow_task_specific(saliencies: Nested) -> Tensor:
    """Equations 4 to 6."""
    total, positions = torch.zeros((), dtype=torch.float64), 0
    for sample in saliencies:
        known = [one for one in sample if one is not None]
        if len(known) < 2:
            continue
        for position in range(known[0].shape[1]):
            sizes = [one[:, position].mean().abs() for one in known]
            whole = sum(sizes)
            if whole == 0:
                continue
            positions += 1
            for size in sizes:
                if size > 0:
                    total = total - (size / whole) * torch.log(size / whole)
    return total / max(positions, 1)


def slow_cross_task(saliencies: Nested, temperature: float) -> Tensor:
    """Equations 7 to 9, with the mean over the tasks of a sample."""
    anchors, own = [], []
    for sample in saliencies:
        known = [one for one in sample if one is not None]
        if len(known) < 2:
            continue
        anchor = torch.stack([one.mean(1) for one in known], 1)  # [C, T]
        matrix = anchor @ anchor.T
        anchors.append((matrix / matrix.norm()).flatten())
        own.append([(one @ one.T / (one @ one.T).norm()).flatten() for one in known])
    if len(anchors) < 2:
        return torch.zeros((), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for b, anchor in enumerate(anchors):
        negative = sum(torch.exp(anchor @ other / temperature) for k, other in enumerate(anchors) if k != b)
        terms = [-torch.log(torch.exp(anchor @ one / temperature) / negative) for one in own[b]]
        total = total + sum(terms) / len(terms)
    return total / len(anchors)
