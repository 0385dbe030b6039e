"""Gradients of single tasks for one optimizer step: taken, averaged over processes, combined and written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...distributed import Ranks
from ...tasks import spread
from ...torch_tools import gradients_of, state_dtype
from .. import gramian_over, weighted_sum
from .losses import LossBatch

Gradients = dict[Tensor, Tensor]


@dataclass
class StepGradients:
    """What the calls for one optimizer step have brought so far."""

    candidates: Collection[Tensor]  # parameters that can turn out to be shared
    by_task: list[Gradients]  # for each task, gradients whose factor is not known yet
    final: Gradients = field(default_factory=dict)  # sums of gradients with their factor, those of the penalty included
    # The same as in Agreed, over all calls; parameters are in the order of the model.
    reach: dict[Tensor, int] = field(default_factory=dict)
    reach_of_penalty: set[Tensor] = field(default_factory=set)
    present: int = 0
    calls: int = 0

    def add_each_task(self, batch: LossBatch) -> None:
        """Take one pass for each task, and one for the penalty. Frees the graph behind the last loss."""
        _add(self.final, gradients_at(batch.penalties, batch.reach_of_penalty, keep_graph=bool(batch.losses)))
        for number, (task, loss) in enumerate(batch.losses.items(), start=1):
            leaves = [leaf for leaf, mask in batch.reach.items() if mask >> task & 1]
            self._add_of_task(task, gradients_at([loss], leaves, keep_graph=number < len(batch.losses)))

    def add_weighted(self, batch: LossBatch, shared: Collection[Tensor], weights: Tensor) -> None:
        """Take one pass through what is shared, for ``sum_t w_t L_t`` and the penalty, and one through the rest."""
        losses = list(batch.losses.values())
        kept = weights[list(batch.losses)]
        inside = [leaf for leaf in batch.reach if leaf in shared]
        outside = [leaf for leaf in batch.reach if leaf not in shared]
        beside = [leaf for leaf in batch.reach_of_penalty if leaf not in shared or leaf not in batch.reach]
        _add(self.final, gradients_at(batch.penalties, beside, keep_graph=bool(losses)))
        for leaf, gradient in gradients_at(losses, outside, keep_graph=bool(inside)).items():
            mask = batch.reach[leaf]
            if mask.bit_count() > 1:  # of several tasks: here, nothing is known to be shared that could be weighed
                _add(self.final, {leaf: gradient})
            else:
                self._add_of_task(mask.bit_length() - 1, {leaf: gradient})
        if any(leaf in shared for leaf in batch.reach_of_penalty):
            losses += batch.penalties
            kept = torch.cat([kept, kept.new_ones(1)])
        _add(self.final, gradients_at(losses, inside, kept))

    def combine(self, shared: Sequence[Tensor], weights: Tensor) -> Gradients:
        """Return ``sum_t w_t g_t`` on the shared parameters, and free their task gradients."""
        combined = {}
        for leaf in shared:
            rows = [own.pop(leaf, None) for own in self.by_task]
            if any(row is not None for row in rows):
                combined[leaf] = weighted_sum(rows, weights.to(leaf.device))
        return combined

    def finish(self, combined: Gradients, shared: Collection[Tensor], weights: Tensor, ranks: Ranks) -> Gradients:
        """Return all gradients to write: ``combined``, and the rest with its factors, as a mean over the processes."""
        for task, own in enumerate(self.by_task):
            for leaf, gradient in own.items():
                if leaf in shared:
                    gradient = weighted_sum([gradient], weights[task : task + 1].to(leaf.device))
                _add(self.final, {leaf: gradient})
        left = [
            leaf
            for leaf, mask in self.reach.items()
            if leaf in self.reach_of_penalty or (mask and leaf not in combined)
        ]
        rest = averaged(left, self.final, ranks)
        for leaf, gradient in combined.items():
            if leaf in rest:
                gradient += rest.pop(leaf)
        return {**combined, **rest}

    def _add_of_task(self, task: int, gradients: Gradients) -> None:
        for leaf, gradient in gradients.items():
            _add(self.by_task[task] if leaf in self.candidates else self.final, {leaf: gradient})


def gradients_at(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], factors: Tensor | None = None, keep_graph: bool = False
) -> Gradients:
    """Return the gradients of ``sum_i factor_i output_i``, without the leaves that get none."""
    if not outputs or not leaves:
        return {}
    seeds = None if factors is None else [factor.to(output) for factor, output in zip(factors, outputs)]
    found = gradients_of(outputs, leaves, seeds, keep_graph=keep_graph)
    return {leaf: gradient for leaf, gradient in zip(leaves, found) if gradient is not None}


def gramian_at(leaves: Sequence[Tensor], rows: Sequence[Mapping[Tensor, Tensor]]) -> Tensor:
    """Return ``[R, R]`` inner products of the gradients in ``rows``, over all the leaves together."""
    return gramian_over(([row.get(leaf) for row in rows] for leaf in leaves), len(rows), leaves[0].device)


def gramian_in_chunks(
    batch: LossBatch, tasks: Sequence[int], size: int, chunk: int, leaves: Sequence[Tensor], ranks: Ranks
) -> Tensor:
    """Return ``[T, T]``, holding ``chunk + 1`` task gradients at most: ``T + (T - chunk) + (T - 2 chunk) + ...`` passes."""

    def gradient_of(task: int) -> Gradients:
        reached = [leaf for leaf in leaves if batch.reach.get(leaf, 0) >> task & 1]
        found = gradients_at([batch.losses[task]], reached, keep_graph=True) if reached else {}
        return averaged(leaves, found, ranks)

    device = leaves[0].device
    gramian = torch.zeros(len(tasks), len(tasks), dtype=state_dtype(device), device=device)
    for start in range(0, len(tasks), chunk):
        stop = min(start + chunk, len(tasks))
        held = [gradient_of(task) for task in tasks[start:stop]]
        gramian[start:stop, start:stop] = gramian_at(leaves, held)
        for later in range(stop, len(tasks)):
            held.append(gradient_of(tasks[later]))
            products = gramian_at(leaves, held)[-1, :-1]
            gramian[later, start:stop] = gramian[start:stop, later] = products
            held.pop()
        held.clear()  # before the next ones come
    return spread(gramian, tasks, size, 0.0)


def averaged(leaves: Sequence[Tensor], gradients: Gradients, ranks: Ranks) -> Gradients:
    """Return means over the processes, in one collective for each format and device; a missing gradient counts as zero.

    All processes have to name the same leaves in the same order. A single process gets all its gradients back.
    """
    if ranks.size == 1:
        return gradients
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for leaf in leaves:
        kinds.setdefault((leaf.dtype, leaf.device), []).append(leaf)
    found: Gradients = {}
    for (dtype, device), alike in kinds.items():
        flat = torch.zeros(sum(leaf.numel() for leaf in alike), dtype=dtype, device=device)
        parts = torch.split(flat, [leaf.numel() for leaf in alike])
        for leaf, part in zip(alike, parts):
            if leaf in gradients:
                part.copy_(gradients[leaf].to_dense().reshape(-1))
        ranks.add(flat).div_(ranks.size)
        found.update((leaf, part.view(leaf.shape)) for leaf, part in zip(alike, parts))
    return found


def write(gradients: Gradients) -> None:
    """Add to ``.grad``, as ``backward`` does, and free each gradient once it is written."""
    while gradients:
        leaf, gradient = gradients.popitem()
        # Never the tensor itself: autograd may return one for several leaves. In the parameter's memory format.
        if leaf.grad is None and gradient.layout == torch.strided:
            leaf.grad = torch.empty_like(leaf, dtype=gradient.dtype).copy_(gradient)
        elif leaf.grad is None:
            leaf.grad = gradient.clone()
        elif leaf.grad.layout == torch.strided:
            leaf.grad.add_(gradient)
        else:
            leaf.grad = gradient + leaf.grad


def _add(sums: Gradients, gradients: Gradients) -> None:
    for leaf, gradient in gradients.items():
        # Not in place: autograd may have returned one tensor for several leaves.
        sums[leaf] = sums[leaf] + gradient if leaf in sums else gradient
