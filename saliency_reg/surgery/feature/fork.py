"""The fork: an autograd node that gives each head its own alias of the feature map, and gets all their gradients back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import SurgeryError
from ...torch_tools import Gradient, added, are_batched, this_pass
from .combiner import GradientCombiner, SeparateGradients, TaskGradients


class GradientFork:
    """The aliases of one forward, ``heads`` of each of the ``sources``, which all heads read.

    The graph holds on to this object, so that it must not hold on to the graph, nor to the combiner. When that is gone,
    gradients are added up.
    """

    def __init__(self, combiner: GradientCombiner, sources: Sequence[Tensor], heads: int) -> None:
        self._combiner = weakref.ref(combiner)
        self.device = sources[0].device
        self._tasks = len(combiner.tasks)
        self.heads = heads
        self.sources = len(sources)
        #: Of a head with a column per task: the latest backward pass through its output, and the task gradients there.
        self.columns: tuple[int, TaskGradients] | None = None
        #: If set, the penalty's gradient arrives at the aliases, too, and this rebuilds each task's gradient there from
        #: that of its output.
        self.of_outputs: Callable[[dict[int, Tensor]], TaskGradients] | None = None
        #: Tasks whose output is watched.
        self.watched: set[int] = set()
        self._at_outputs: dict[int, tuple[int, Tensor]] = {}  # with their backward pass
        #: Whether a backward pass was here.
        self.done = False
        self._arrived: Tensor | None = None

    def hand_out(self, sources: Sequence[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Return aliases ``[head][source]``, and an anchor for each source that bypasses the surgery."""
        outputs = list(_ForkNode.apply(self, *sources))
        rows = [outputs[start : start + self.sources] for start in range(0, len(outputs), self.sources)]
        return rows[:-1], rows[-1]

    def combiner_now(self) -> GradientCombiner | None:
        """Return the combiner, if gradients that arrive now are to be weighed."""
        combiner = self._combiner()
        # With create_graph=True somebody measures (a gradient penalty, a saliency): nothing is to be changed.
        return combiner if combiner is not None and combiner.combines and not torch.is_grad_enabled() else None

    def watch(self, task: int, output: Tensor) -> Tensor:
        """Return an alias of a head's output for the rest of the model, whose gradient is that of the losses alone.

        What saves its own output for its derivative (a sigmoid) would get a part of the penalty's gradient there.
        """

        def note(gradient: Gradient) -> None:
            if gradient is not None:
                self._at_outputs[task] = this_pass(), gradient

        self.watched.add(task)
        return noted(output, note)

    def backward(self, gradients: Sequence[Gradient]) -> list[Gradient]:
        """Turn ``heads * sources`` gradients of the aliases and ``sources`` of the anchors into one for each source."""
        per_source = [list(gradients[source : -self.sources : self.sources]) for source in range(self.sources)]
        combiner = self.combiner_now()
        if are_batched(gradients):  # many backward passes at once: somebody measures here, too (a Jacobian)
            combiner = None
        combined = [added(*own) for own in per_source]
        if combiner is not None:
            self.done = True
            weighed = combiner.combine(self._task_gradients(per_source), combined)
            if weighed is not None:
                combined = weighed
                self._note_arrival(combiner)
        return [added(own, anchor) for own, anchor in zip(combined, gradients[-self.sources :])]

    def _task_gradients(self, per_source: Sequence[Sequence[Gradient]]) -> TaskGradients:
        now = this_pass()
        columns, self.columns = self.columns, None
        if columns is not None and columns[0] == now:
            return columns[1]
        if self.of_outputs is not None:
            return self.of_outputs({task: one for task, (then, one) in self._at_outputs.items() if then == now})
        if self.heads < self._tasks:  # one head with a column per task, none of which has a loss
            per_source = [[None] * self._tasks] * self.sources
        return SeparateGradients(per_source, self.device)

    def _note_arrival(self, combiner: GradientCombiner) -> None:
        here, before = combiner.arrived, self._arrived
        self._arrived = here if before is None else here | before
        if before is None or not (bool((here & ~before).any()) and bool((before & ~here).any())):
            return
        names = [[task for task, marked in zip(combiner.tasks, part.tolist()) if marked] for part in (before, here)]
        raise SurgeryError(
            f"the gradients of {names[0]} and of {names[1]} arrived in separate backward passes, so that they cannot be "
            "weighed against each other. Add up the losses and call backward once, after optimizer.zero_grad(). To look at "
            "single tasks, take their gradients within 'with surgery.passing():'. If another method combines the task "
            "gradients (TorchJD, a PCGrad optimizer), leave surgery= out."
        )


def noted(tensor: Tensor, note: Callable[[Gradient], None], *anchors: Tensor) -> Tensor:
    """Return an alias whose gradient ``note`` is called with, in backward passes that are not differentiated themselves.

    Such a pass goes on to the nodes of the ``anchors``, too, with ``None``.
    """
    alias: Tensor = _Noted.apply(note, tensor, *anchors)
    return alias


# No tensor is saved in these nodes: a recomputation under checkpointing makes no fork, and has to save what the forward
# saved. detach shares the memory without being a view to autograd.


class _ForkNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fork: GradientFork, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.fork = fork
        ctx.weighs_task_gradients = True  # by which surgery on parameters knows this node
        ctx.inputs_apart = len(sources)
        return tuple(source.detach() for _ in range(fork.heads + 1) for source in sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Gradient) -> tuple[Gradient, ...]:
        return None, *ctx.fork.backward(gradients)


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, note: Callable[[Gradient], None], tensor: Tensor, *anchors: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.note, ctx.anchors = note, len(anchors)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Gradient) -> tuple[Gradient, ...]:
        if not torch.is_grad_enabled():
            ctx.note(gradient)
        return None, gradient, *[None] * ctx.anchors


class Anchor(torch.autograd.Function):
    """A way to a tensor for a gradient that was computed before the backward pass. No output of the model comes from it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
