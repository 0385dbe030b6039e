"""The fork: an autograd node that gives each head its own alias of the feature map, and gets all their gradients back."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import SurgeryError
from ...torch_tools import Gradient, added, this_pass
from .combiner import GradientCombiner, KnownGradients


class GradientFork:
    """The aliases of one forward.

    The graph holds on to this object, so that it must not hold on to the graph, nor to the combiner.

    Args:
        combiner: weighs the gradients. When it is gone, they are added up.
        sources: the tensors that all heads read.
        heads: number of aliases of each.
    """

    def __init__(self, combiner: GradientCombiner, sources: Sequence[Tensor], heads: int) -> None:
        self._combiner = weakref.ref(combiner)
        self._device = sources[0].device
        self._tasks = len(combiner.tasks)
        self.heads = heads
        self.sources = len(sources)
        self._columns: tuple[int, KnownGradients] | None = None
        #: Where the penalty's gradient arrives at the aliases too: the task gradients without it.
        self.known: KnownGradients | None = None
        #: Tasks whose output is watched, and the gradients that arrived there, with their backward pass.
        self.watched: set[int] = set()
        self._at_outputs: dict[int, tuple[int, Tensor]] = {}
        #: Whether a backward pass was here.
        self.done = False
        self._arrived: Tensor | None = None

    def combiner_now(self) -> GradientCombiner | None:
        """The combiner, if gradients that arrive now are to be weighed."""
        combiner = self._combiner()
        # With create_graph=True somebody measures (a gradient penalty, a saliency): nothing is to be changed.
        return combiner if combiner is not None and combiner.combines and not torch.is_grad_enabled() else None

    def watch(self, task: int, output: Tensor) -> Tensor:
        """An alias of a head's output for the rest of the model, whose gradient is that of the losses alone.

        What saves its own output for its derivative (a sigmoid) would get a part of the penalty's gradient there.
        """
        self.watched.add(task)
        alias: Tensor = _Watch.apply(self, task, output)
        return alias

    def note_output(self, task: int, gradient: Tensor) -> None:
        """Of a watched output."""
        self._at_outputs[task] = (this_pass(), gradient)

    def at_outputs(self) -> dict[int, Tensor]:
        """The gradients of watched outputs in this backward pass."""
        now = this_pass()
        return {task: gradient for task, (arrived, gradient) in self._at_outputs.items() if arrived == now}

    def note_columns(self, columns: KnownGradients) -> None:
        """From the output of a head with a column per task, for the fork's backward in the same pass."""
        self._columns = (this_pass(), columns)

    def backward(self, gradients: Sequence[Gradient]) -> list[Gradient]:
        """``heads * sources`` gradients of the aliases and ``sources`` of the anchors, to one for each source."""
        per_source = [list(gradients[source : -self.sources : self.sources]) for source in range(self.sources)]
        anchors = gradients[-self.sources :]
        blocker, combiner = self._combiner(), self.combiner_now()
        if blocker is not None and blocker.blocks:
            return [None] * self.sources
        if combiner is None:
            return [added(*own, anchor) for own, anchor in zip(per_source, anchors)]
        self.done = True
        known = self.known
        if self._columns is not None and self._columns[0] == this_pass():
            known = self._columns[1]
        self._columns = None
        arrived = [added(*own) for own in per_source]
        if known is not None:
            combined = combiner.combine_known(known, arrived)
        elif self.heads < self._tasks:  # one head with a column per task, none of which has a loss
            combined = combiner.combine([[None] * self._tasks] * self.sources, self._device)
            combined = combined and [added(*pair) for pair in zip(combined, arrived)]
        else:
            combined = combiner.combine(per_source, self._device)
        if combined is None:
            combined = arrived
        else:
            self._note_arrival(combiner)
        return [added(own, anchor) for own, anchor in zip(combined, anchors)]

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


def fork(
    combiner: GradientCombiner, sources: Sequence[Tensor], heads: int
) -> tuple[list[list[Tensor]], list[Tensor], GradientFork]:
    """Return aliases ``[head][source]``, an anchor for each source that bypasses the surgery, and the fork."""
    made = GradientFork(combiner, sources, heads)
    outputs = _ForkNode.apply(made, *sources)
    width = len(sources)
    aliases = [list(outputs[head * width : (head + 1) * width]) for head in range(heads)]
    return aliases, list(outputs[heads * width :]), made


class _ForkNode(torch.autograd.Function):
    # No tensor is saved: a recomputation under checkpointing makes no fork, and has to save what the forward saved.

    @staticmethod
    def forward(ctx: Any, made: GradientFork, *sources: Tensor) -> tuple[Tensor, ...]:
        """Aliases of the feature maps for each head, and for what bypasses them."""
        ctx.set_materialize_grads(False)
        ctx.fork = made
        ctx.weighs_task_gradients = True  # by which surgery on parameters knows this node
        # detach shares the memory without being a view to autograd.
        return tuple(source.detach() for _ in range(made.heads + 1) for source in sources)

    @staticmethod
    def backward(ctx: Any, *gradients: Gradient) -> tuple[Gradient, ...]:
        """Weigh what the heads send back, and add it up."""
        return None, *ctx.fork.backward(gradients)


class _Watch(torch.autograd.Function):
    # As at the fork, nothing is saved.

    @staticmethod
    def forward(ctx: Any, made: GradientFork, task: int, output: Tensor) -> Tensor:
        """The output as it is."""
        ctx.set_materialize_grads(False)
        ctx.fork, ctx.task = made, task
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Gradient) -> tuple[None, None, Gradient]:
        """Note the gradient of the output, in a pass that is not differentiated itself; it goes on as it is."""
        if gradient is not None and not torch.is_grad_enabled():
            ctx.fork.note_output(ctx.task, gradient)
        return None, None, gradient


class Anchor(torch.autograd.Function):
    """A named feature map for the model and, as second output, for a gradient that was computed before the backward pass.

    Args of ``apply``: the combiner and the feature map.
    """

    @staticmethod
    def forward(ctx: Any, combiner: GradientCombiner, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The feature map twice."""
        ctx.set_materialize_grads(False)
        ctx.combiner = weakref.ref(combiner)
        return feature.detach(), feature.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Gradient) -> tuple[None, Gradient]:
        """The sum of both gradients; none while the combiner blocks."""
        combiner = ctx.combiner()
        return None, None if combiner is not None and combiner.blocks else added(*gradients)
