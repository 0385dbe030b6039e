"""Gradients of single tasks for one optimizer step: taken, averaged over processes, combined and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from ...distributed import Ranks
from ...tasks import spread
from ...torch_tools import gradients_of, state_dtype
from .. import gramian_of, weighted_sum
from .losses import LossBatch
from .shared_parameters import has_several

Gradients = dict[Tensor, Tensor]


@dataclass
class StepGradients:
    """What the calls for one optimizer step have brought so far.

    Attributes:
        candidates: the parameters that can turn out to be shared, in the order of the model.
        reach: parameter, in the order of the model, to the bit mask of the tasks whose losses depend on it, over all calls
            and processes.
        reach_of_penalty: the same for the penalty.
        present: bit mask of the tasks that had a loss.
        by_task: gradients whose factor is not known yet.
        final: sums of gradients with their factor: of the penalty, of leaves that cannot be shared, of known weights.
    """

    candidates: Sequence[Tensor]
    reach: dict[Tensor, int] = field(default_factory=dict)
    reach_of_penalty: set[Tensor] = field(default_factory=set)
    present: int = 0
    by_task: dict[int, Gradients] = field(default_factory=dict)
    final: Gradients = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kept_apart = set(self.candidates)

    def add_each_task(self, batch: LossBatch) -> None:
        """One pass for each task, and one for the penalty. Frees the graph behind the last loss."""
        if batch.penalty is not None:
            self._add_final(gradients_at([batch.penalty], batch.reach_of_penalty, keep_graph=bool(batch.losses)))
        for number, (task, loss) in enumerate(batch.losses.items(), start=1):
            leaves = [leaf for leaf, mask in batch.reach.items() if mask >> task & 1]
            self._add_of_task(task, gradients_at([loss], leaves, keep_graph=number < len(batch.losses)))

    def add_weighted(self, batch: LossBatch, shared: Set[Tensor], weights: Tensor) -> None:
        """One pass through what is shared, for ``sum_t w_t L_t`` and the penalty; one through the rest of the graph."""
        losses = list(batch.losses.values())
        kept = weights[list(batch.losses)]
        inside = [leaf for leaf in batch.reach if leaf in shared]
        outside = [leaf for leaf in batch.reach if leaf not in shared]
        if batch.penalty is not None:
            beside = [leaf for leaf in batch.reach_of_penalty if leaf not in shared or leaf not in batch.reach]
            self._add_final(gradients_at([batch.penalty], beside, keep_graph=bool(losses)))
        for leaf, gradient in gradients_at(losses, outside, keep_graph=bool(inside)).items():
            mask = batch.reach[leaf]
            if has_several(mask):  # of several tasks: here, nothing is known to be shared that could be weighed
                self._add_final({leaf: gradient})
            else:
                self._add_of_task(mask.bit_length() - 1, {leaf: gradient})
        if batch.penalty is not None and any(leaf in shared for leaf in batch.reach_of_penalty):
            losses = [*losses, batch.penalty]
            kept = torch.cat([kept, kept.new_ones(1)])
        self._add_final(gradients_at(losses, inside, kept))

    def average_tasks(self, tasks: Sequence[int], shared: Sequence[Tensor], ranks: Ranks) -> None:
        """Replace the task gradients on the shared parameters by their means over the processes."""
        if ranks.size > 1:
            for task in tasks:
                own = self.by_task.setdefault(task, {})
                own.update(averaged(shared, own, ranks))

    def gramian(self, measured: Sequence[Tensor], num_tasks: int) -> Tensor:
        """``[T, T]`` inner products of the task gradients that are kept."""
        return gramian_over(measured, [self.by_task.get(task, {}) for task in range(num_tasks)])

    def combine(self, shared: Sequence[Tensor], weights: Tensor) -> Gradients:
        """``sum_t w_t g_t`` on the shared parameters, whose task gradients are let go."""
        combined = {}
        for leaf in shared:
            rows = [_dense(self.by_task.get(task, {}).pop(leaf, None)) for task in range(len(weights))]
            if any(row is not None for row in rows):
                combined[leaf] = weighted_sum(rows, weights.to(leaf.device))
        return combined

    def finish(self, combined: Gradients, shared: Set[Tensor], weights: Tensor, ranks: Ranks) -> Gradients:
        """All that is to be written: ``combined``, and what is left, with its factors, as a mean over the processes."""
        for task, own in self.by_task.items():
            for leaf, gradient in own.items():
                if leaf in shared:
                    gradient = weighted_sum([_dense(gradient)], weights[task : task + 1].to(leaf.device))
                _add(self.final, leaf, gradient)
        rest = self.final
        if ranks.size > 1:
            left = [
                leaf
                for leaf, mask in self.reach.items()
                if leaf in self.reach_of_penalty or (mask and leaf not in combined)
            ]
            rest = averaged(left, rest, ranks)
        for leaf, gradient in combined.items():
            if leaf in rest:
                gradient += rest.pop(leaf)
        return {**combined, **rest}

    def _add_of_task(self, task: int, gradients: Gradients) -> None:
        own = self.by_task.setdefault(task, {})
        for leaf, gradient in gradients.items():
            if leaf in self._kept_apart:
                _add(own, leaf, gradient)
            else:
                _add(self.final, leaf, gradient)

    def _add_final(self, gradients: Gradients) -> None:
        for leaf, gradient in gradients.items():
            _add(self.final, leaf, gradient)


def gradients_at(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], factors: Tensor | None = None, keep_graph: bool = False
) -> Gradients:
    """Gradients of ``sum_i factor_i output_i``, without the leaves that get none."""
    if not outputs or not leaves:
        return {}
    seeds = None if factors is None else [factor.to(output) for factor, output in zip(factors, outputs)]
    found = gradients_of(outputs, leaves, seeds, keep_graph=keep_graph)
    return {leaf: gradient for leaf, gradient in zip(leaves, found) if gradient is not None}


def gramian_over(leaves: Sequence[Tensor], rows: Sequence[Mapping[Tensor, Tensor]]) -> Tensor:
    """``[R, R]`` inner products of the gradients in ``rows``, over all the leaves together."""
    device = leaves[0].device
    total = torch.zeros(len(rows), len(rows), dtype=state_dtype(device), device=device)
    for leaf in leaves:
        own = [_dense(row.get(leaf)) for row in rows]
        if any(gradient is not None for gradient in own):
            total += gramian_of(own).to(device)
    return total


def gramian_in_chunks(
    tasks: Sequence[int], size: int, chunk: int, leaves: Sequence[Tensor], gradient_of: Callable[[int], Gradients]
) -> Tensor:
    """``[T, T]`` with at most ``chunk + 1`` task gradients at a time; ``T + (T - chunk) + (T - 2 chunk) + ...`` passes."""
    device = leaves[0].device
    gramian = torch.zeros(len(tasks), len(tasks), dtype=state_dtype(device), device=device)
    for start in range(0, len(tasks), chunk):
        stop = min(start + chunk, len(tasks))
        held = [gradient_of(task) for task in tasks[start:stop]]
        gramian[start:stop, start:stop] = gramian_over(leaves, held)
        for later in range(stop, len(tasks)):
            held.append(gradient_of(tasks[later]))
            products = gramian_over(leaves, held)[-1, :-1]
            gramian[later, start:stop] = gramian[start:stop, later] = products
            held.pop()
        held.clear()  # before the next ones come
    return spread(gramian, tasks, size, 0.0)


def averaged(leaves: Sequence[Tensor], gradients: Mapping[Tensor, Tensor], ranks: Ranks) -> Gradients:
    """Means over the processes, in one collective for each format and device; a gradient that is missing counts as zero.

    All processes have to name the same leaves in the same order.
    """
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for leaf in leaves:
        kinds.setdefault((leaf.dtype, leaf.device), []).append(leaf)
    found: Gradients = {}
    for (dtype, device), alike in kinds.items():
        flat = torch.zeros(sum(leaf.numel() for leaf in alike), dtype=dtype, device=device)
        parts = torch.split(flat, [leaf.numel() for leaf in alike])
        for leaf, part in zip(alike, parts):
            if leaf in gradients:
                part.copy_(_dense(gradients[leaf]).reshape(-1))
        ranks.add(flat).div_(ranks.size)
        found.update((leaf, part.view(leaf.shape)) for leaf, part in zip(alike, parts))
    return found


def write(gradients: Gradients) -> None:
    """Add to ``.grad``, as ``backward`` does, and let go of what was written."""
    while gradients:
        leaf, gradient = gradients.popitem()
        if leaf.grad is not None and leaf.grad.layout == torch.strided:
            leaf.grad.add_(gradient)
        elif leaf.grad is not None:
            leaf.grad = gradient + leaf.grad
        elif gradient.layout == torch.strided:
            # Never the tensor itself: autograd may return one for several leaves. In the parameter's memory format.
            leaf.grad = torch.empty_like(leaf, dtype=gradient.dtype).copy_(gradient)
        else:
            leaf.grad = gradient.clone()


@overload
def _dense(gradient: Tensor) -> Tensor: ...
@overload
def _dense(gradient: Tensor | None) -> Tensor | None: ...
def _dense(gradient: Tensor | None) -> Tensor | None:
    """Those of embeddings may be sparse."""
    return gradient if gradient is None or gradient.layout == torch.strided else gradient.to_dense()


def _add(sums: Gradients, leaf: Tensor, gradient: Tensor) -> None:
    known = sums.get(leaf)
    # Not in place: autograd may have returned one tensor for several leaves.
    sums[leaf] = gradient if known is None else known + gradient
