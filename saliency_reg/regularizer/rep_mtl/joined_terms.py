"""One call: from the saliencies of this process to the two terms of the joined batch of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...distributed import Ranks
from ...errors import ConfigurationError
from ...saliency import Saliencies
from ...torch_tools import state_dtype
from .terms import alignment, anchor_products, positions_entropy, spread_over_others, unit_anchors


@dataclass(frozen=True)
class Wanted:
    """Which of the terms are taken, and how."""

    task_specific: bool
    cross_task: bool
    temperature: float


@dataclass(frozen=True)
class JoinedTerms:
    """The two terms of the joined batch: the same value in all processes, with the graph of this one's samples alone.

    The gradients that the processes get of it add up to that of the joined batch.
    """

    task_specific: Tensor  # 0-dim
    cross_task: Tensor  # 0-dim
    samples: Tensor  # [T], at which each task has a saliency
    together: Tensor  # 0-dim, samples at which two tasks have one
    own: Tensor  # 0-dim, those of this process


def inverse_losses(losses: Mapping[int, Tensor], tasks: tuple[str, ...], device: torch.device, ranks: Ranks) -> Tensor:
    """Return ``[T]``: one over the sum of each task's losses ``[B]``, of all processes; 0 for a task without any.

    The derivative of ``log L`` is that of ``L`` times this, but for a factor that all tasks have in common.

    Raises:
        ConfigurationError: a negative sum, which has no logarithm. In all processes at once.
    """
    totals = torch.zeros(len(tasks), dtype=state_dtype(device), device=device)
    for task, loss in losses.items():
        totals[task] = loss.detach().to(totals).sum()
    totals = ranks.add(totals)
    if bool((totals < 0).any()):
        negative = [task for task, total in zip(tasks, totals.tolist()) if total < 0]
        raise ConfigurationError(
            f"the losses of {negative} are negative, and log_losses=True takes their logarithm. Pass log_losses=False."
        )
    zero = totals == 0
    return torch.where(zero, torch.zeros_like(totals), 1 / torch.where(zero, torch.ones_like(totals), totals))


def joined_terms(
    saliencies: Saliencies, factors: Tensor | None, wanted: Wanted, num_tasks: int, ranks: Ranks
) -> JoinedTerms:
    """Return both terms; those that are not wanted are 0. All processes come here, also one without saliencies.

    ``factors`` ``[T]``: what the saliencies of each task are multiplied by.
    """
    values = _by_sample(saliencies, num_tasks)
    has = values.detach().ne(0).flatten(2).any(2)
    scale = values.new_ones(num_tasks) if factors is None else factors.to(values)
    has = has & (scale != 0)
    together = has.sum(1) >= 2
    counts = [together.sum(), *has.sum(0)]
    if not bool(together.all()):  # samples of one task alone would take as much time, and add nothing
        values, has, together = values[together], has[together], together[together]
    entropy = positions = aligned = values.new_zeros(())
    anchors, anchored = values.new_zeros(0, num_tasks, 1), together
    if wanted.task_specific:
        entropy, positions = positions_entropy(values.mean(2) * scale.view(1, -1, 1), together)
    if wanted.cross_task:
        anchors, anchored = unit_anchors(values.mean(3) * scale.view(1, -1, 1), together)
        counted = has & anchored.unsqueeze(1)
        cosines = torch.where(counted, alignment(values, anchors, has), 0.0)
        aligned = (cosines.sum(1) / counted.sum(1).clamp(min=1)).sum()
        anchors = anchors[anchored]
    own = torch.stack([entropy, aligned, *(count.to(values.dtype) for count in (positions, *counts))])
    joined = own
    if ranks.size > 1:  # the value is that of all, the graph is that of this process
        precise = own.detach().to(state_dtype(own.device))
        joined = own + (ranks.add(precise.clone()) - precise).to(own.dtype)
        anchors = _of_all(anchors, ranks)
    entropy, aligned, positions, pairs = joined[:4].unbind()
    alignments = values.new_zeros(())
    if len(anchors) >= 2:  # a single sample has no negatives
        spread = spread_over_others(anchor_products(anchors), wanted.temperature).mean()
        alignments = spread - aligned / (wanted.temperature * len(anchors))
    mean_entropy, samples = entropy / positions.detach().clamp(min=1), joined[4:].detach().long()
    return JoinedTerms(mean_entropy, alignments, samples, pairs.detach(), counts[0])


def _by_sample(saliencies: Saliencies, num_tasks: int) -> Tensor:
    """Return saliencies ``[B, T, C, P]``, zero where a task has none; without samples where nothing is comparable."""
    if not saliencies.comparable:
        return saliencies.values.new_zeros(0, num_tasks, 1, 1)
    assert saliencies.channel_axis is not None  # there is one feature map
    values = saliencies.values.movedim(saliencies.channel_axis + 1, 2)  # [t, B, C, ...]
    values = values.unsqueeze(-1).flatten(3).transpose(0, 1)
    if len(saliencies.present) == num_tasks:
        return values
    spread = values.new_zeros(len(values), num_tasks, *values.shape[2:])
    spread[:, saliencies.present] = values
    return spread


def _of_all(anchors: Tensor, ranks: Ranks) -> Tensor:
    """Return the anchors ``[N, T, C]`` of all processes, of which those of this one keep their graph."""
    everywhere, own = ranks.rows_of_all(anchors.flatten(1))
    tasks = anchors.shape[1]
    whole = [rows.view(len(rows), tasks, -1) for rows in everywhere if len(rows)]
    if len(anchors):
        whole[sum(len(rows) > 0 for rows in everywhere[:own])] = anchors
    return torch.cat([rows.to(anchors.device) for rows in whole]) if whole else anchors
