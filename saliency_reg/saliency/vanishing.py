"""Tasks whose saliency is nothing but rounding: told, and not compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..capture import CapturedForward
from ..torch_tools import Edge, gradients_of
from .pooling import Pooling
from .scalars import LABEL_SCALARIZATIONS, Scalarize, weighed_unequally

#: A saliency below this share of the largest one, or of what its output has, is looked at.
_SMALL = 1e-3
#: So many times heads with weights of zero are left the time to begin.
_MOST_WAITING = 20
_AUTO = (
    "scalarize={choice} leaves out what the outputs of a sample have in common. For outputs that are no classes (ordinal, "
    "several labels, numbers, boxes) pass scalarize='sum', or scalarize={sums}"
)
_OTHERS = (
    "what scalarize={choice} makes of their outputs does not change with the feature map (softmax outputs add up to 1). "
    "Pass another scalarize=, or choose the logits with output="
)
_POOLED = (
    "its gradients add up to zero over the pooled positions, as in front of a normalisation. Pass pool=None or the right "
    "channel_axis=, or choose a feature map behind it"
)
_DEAD = (
    "their outputs do not react to the feature map (rounding, a threshold, a dead activation, weights of zero), or only to "
    "what tells the samples of a batch apart. Choose the "
    "module that returns the logits, or say which part they are with output="
)


class Vanishing:
    """Looks at the saliencies of a task until it has had one; ``have_one`` are the tasks that had."""

    def __init__(self, tasks: Sequence[str], choices: Sequence[Scalarize], have_one: set[int]) -> None:
        self._tasks = tuple(tasks)
        self._choices = choices
        self._have_one = have_one
        self._by_labels = {task for task, choice in enumerate(choices) if choice in LABEL_SCALARIZATIONS}
        self._told: set[int] = set()
        self._waited = 0

    def among(
        self,
        present: Sequence[int],
        values: Tensor,
        forward: CapturedForward,
        poolings: Sequence[Pooling],
        real: Tensor | None,
    ) -> tuple[set[int], list[str]]:
        """Return the tasks without a saliency in this forward, and what to tell of them.

        ``values`` ``[t, B, ...]`` are the saliencies of ``present``.
        """
        looked_at = set(present) - self._have_one - self._by_labels
        if not looked_at or not (real is None or bool(real.any())):
            return set(), []
        sizes: list[float] = values.detach().abs().flatten(1).amax(1).tolist()
        if not all(map(math.isfinite, sizes)):
            return set(), []
        reference = max(*sizes, self._reaction(forward, present[0], poolings))
        found: dict[int, str] = {}
        self._waited += 1
        for task, size in zip(present, sizes):
            if task not in looked_at:
                continue
            if size > _SMALL * reference or size > self._rounding(forward, task) * (
                reaction := self._reaction(forward, task, poolings)
            ):
                self._have_one.add(task)
            elif reaction > 0 or not self._may_begin(forward, task):
                found[task] = self._reason(forward, task) if reaction > 0 else _DEAD
        return set(found), list(self._messages(found))

    def _messages(self, found: dict[int, str]) -> Iterator[str]:
        for reason in dict.fromkeys(found.values()):
            tasks = [task for task, own in found.items() if own == reason and task not in self._told]
            if not tasks:
                continue
            self._told.update(tasks)
            choice = self._choices[tasks[0]]
            shown = repr(choice) if isinstance(choice, str) else "<function>"
            names = [self._tasks[task] for task in tasks]
            why = reason.format(choice=shown, sums=dict.fromkeys(names, "sum"))
            yield (
                f"the saliency of {names} is zero, or nothing but rounding, at every sample "
                f"of this batch, and is not compared with those of other tasks: {why}."
            )

    def _reason(self, forward: CapturedForward, task: int) -> str:
        if forward.columns or forward.outputs[forward.row_of(task)][:1].numel() == 1:
            return _POOLED
        return _AUTO if self._choices[task] == "auto" else _OTHERS

    def _reaction(self, forward: CapturedForward, task: int, poolings: Sequence[Pooling]) -> float:
        """Return how large the pooled gradient of a task's outputs would be if nothing in it cancelled."""
        row = forward.row_of(task)
        output = forward.outputs[row]
        if not output.requires_grad or output.numel() == 0:
            return 0.0
        edges: list[Edge] = [feature.edges[row] for feature in forward.features]
        total = weighed_unequally(output).sum()
        pooled = [
            pooling.pooled(gradient.abs())
            for pooling, feature, at_edge in zip(poolings, forward.features, gradients_of([total], edges))
            if (gradient := feature.gradient(at_edge)) is not None
        ]
        return max((float(each.max()) for each in pooled), default=0.0)

    def _rounding(self, forward: CapturedForward, task: int) -> float:
        """The share of a gradient that may be rounding."""
        output = forward.outputs[forward.row_of(task)]
        dtypes = [output.dtype, *(feature.tensor.dtype for feature in forward.features)]
        return min(64 * max(torch.finfo(dtype).eps for dtype in dtypes), _SMALL)

    def _may_begin(self, forward: CapturedForward, task: int) -> bool:
        """Whether the head has weights of zero, which it may leave in the next steps."""
        weights = forward.modules[0 if forward.columns else task].parameters() if forward.modules else ()
        zero = any(weight.ndim > 1 and not bool(weight.detach().any()) for weight in weights)
        return zero and self._waited <= _MOST_WAITING
