"""What a user is told once: calls that cannot act, and what should have happened after training has gone on for a while."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..report import SaliencyReport
from ..saliency import mark_sequence_first
from ..torch_tools import ModuleHooks, PartlyCopied, derives_from, in_backward, warn_user
from .strength import LEAST_SHARE, MOST_SHARE, strength_advice

logger = logging.getLogger("saliency_reg")

#: Training calls, forwards or optimizer steps without something, after which the user is told.
CALLS = 100
#: Calls in which never two heads ran together, after which the user is told.
ALONE = 5
#: Calls without an optimizer step, in which an automatic strength cannot be found, after which the user is told.
WAITING = 30
_WRAPPERS = ("FullyShardedDataParallel", "DistributedDataParallel", "CheckpointWrapper", "OptimizedModule")
_NO_OPTIMIZER = (
    f"the relations have not moved in {CALLS} training calls: no optimizer is attached. Pass optimizer=..., call "
    "regularizer.attach_optimizer(optimizer), or call regularizer.step() after each update."
)
_NO_STEP = (
    f"the relations have not moved in {CALLS} training calls: the attached optimizer took no step. That is right if you "
    "accumulate so many batches. If you made a new optimizer, call regularizer.attach_optimizer(optimizer); an engine that "
    "never calls the optimizer's hooks needs regularizer.step()."
)
_WAITS = (
    "the penalty has been 0 in all {calls} calls so far: strength='auto' is found in optimizer steps, and none was taken. "
    "That is right if you accumulate so many batches. {advice}Call regularizer.step() after each update if an engine never "
    "calls the optimizer's hooks, or pass a number as strength=."
)
_ATTACH = "Pass optimizer=..., or call regularizer.attach_optimizer(optimizer). "
_NOT_FOUND = (
    "the penalty has been 0 in all {calls} calls so far: strength='auto' finds no strength, because the losses that are "
    "given or the distances between the tasks are 0 or not finite, or start_step is not over. Look at regularizer.report, "
    "or pass a number as strength=."
)
_NEVER_RAN = (
    f"the heads of {{tasks}} have not run in {CALLS} training calls, so the penalty leaves them out. If a head was replaced "
    "after attaching, call .remove() and build the regularizer anew."
)
_ALONE = (
    f"never two tasks have come together in {ALONE} training calls, so the penalty was 0 in all of them: it compares tasks "
    "on the same samples. {advice}"
)
_RUN_ALL = (
    "Pass run_all_heads=True and call the regularizer after each forward, or run all heads in each forward and take the "
    "loss of one."
)
_RUN_ALL_IN_FORWARD = "Run all heads in each forward, and take the loss of one."
_SEVERAL_LOSSES = "Pass the losses of all tasks that have one in the same call."
_NOT_CALLED = (
    "{count} and regularizer() was not called with gradients enabled since: no penalty is in the loss, and the relations do "
    "not move. Call it after each training forward and add it, loss = losses + regularizer(); set .enabled = False if it is "
    "not to act."
)
_STEPS = f"the attached optimizer took {CALLS} steps"
_FORWARDS = f"the heads ran in {CALLS} training forwards"
_NOT_DIFFERENTIATED = (
    f"no backward pass has reached the penalty in {CALLS} training calls: it was computed and changed no gradient. Add what "
    "regularizer() returns to the loss before loss.backward(), without .item() or .detach()."
)
_NO_GRAPH = (
    f"regularizer() returned 0 in {CALLS} calls, because the outputs of the heads carry no graph. Run the model with "
    "gradients enabled and heads that require grad, or call regularizer() under torch.no_grad() where none is meant."
)
_REPLACED = (
    "{name!r} is no longer the module that the regularizer is attached to, but a {kind}: what the heads in the model "
    "compute now is not what the penalty is of. Call .remove(), and build the regularizer anew."
)


class Reminders(PartlyCopied):
    """Counts training calls, and warns once of each thing that should have happened by now."""

    in_a_copy: ClassVar[dict[str, Any]] = {"_hooks": None, "_places": []}
    _heads: frozenset[str] = frozenset()

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = tuple(tasks)
        self._told: set[str] = set()
        self._calls = 0
        self._since_step = 0
        self._steps_without_call = 0
        self._forwards_without_call = 0
        self._calls_without_graph = 0
        self._together = False
        #: The number of the latest call in which a task's head ran.
        self._latest = [0] * len(self._tasks)
        self._differentiated: list[bool] = []
        self._undifferentiated = 0
        self._waited = 0
        #: The penalty at a strength of 1 as a share of the task losses, from one of the first calls with losses.
        self._share: float | None = None
        self.enabled = True
        self._hooks: ModuleHooks | None = None
        self._places: list[tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module], str]] = []

    def attach(self, model: nn.Module, names: Sequence[str], heads: Sequence[nn.Module]) -> None:
        """Count the forwards of the heads, and remember where in the model they are."""
        self._heads = frozenset(names)
        self._hooks = ModuleHooks(self, tells=False)  # the capture does
        self._hooks.after(heads[0], self._ran)
        for layer in model.modules():
            if isinstance(layer, nn.RNNBase) and not layer.batch_first:
                self._hooks.after(layer, self._ran_over_a_sequence)
        places: dict[str, tuple[weakref.ref[nn.Module], str, weakref.ref[nn.Module], str]] = {}
        for name in names:
            parent, path = model, ""
            for key in name.split(".") if name else ():
                path = f"{path}.{key}" if path else key
                child = parent._modules.get(key)
                if child is None:
                    break
                places[path] = weakref.ref(parent), key, weakref.ref(child), path
                parent = child
        self._places = list(places.values())

    def change_tasks(self, tasks: Sequence[str], order: Sequence[int | None]) -> None:
        """Count other tasks: for each of them its index so far, ``None`` for a new one."""
        self._tasks = tuple(tasks)
        self._latest = [self._calls if task is None else self._latest[task] for task in order]

    def remove(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()

    def stepped(self) -> None:
        """Note that the relations were given the chance to move."""
        self._since_step = 0
        if self.enabled:
            self._steps_without_call += 1
            if self._steps_without_call == CALLS:
                self._tell("not called", _NOT_CALLED.format(count=_STEPS))

    def without_graph(self) -> None:
        """Note a call with gradients enabled for a forward without a graph."""
        self._calls_without_graph += 1
        self._forwards_without_call = self._steps_without_call = 0
        if self._calls_without_graph == CALLS:
            self._tell("graph", _NO_GRAPH)

    def called(self, ran: Sequence[int], present: Sequence[int], has_optimizer: bool, several_processes: bool) -> None:
        """Note a training call in which the heads of some tasks ``ran``, of which those ``present`` have a saliency."""
        self._calls += 1
        self._since_step += 1
        self._steps_without_call = self._forwards_without_call = self._calls_without_graph = 0
        self._together = self._together or len(present) != 1  # without any, others do
        for task in ran:
            self._latest[task] = self._calls
        if self._places:
            self._check_places()
        if self._since_step == CALLS:
            unused = f" Also, {_NOT_DIFFERENTIATED}" if self._undifferentiated >= CALLS - 1 else ""
            self._tell("steps", (_NO_STEP if has_optimizer else _NO_OPTIMIZER) + unused)
            if unused:
                self._told.add("backward")
        if self._calls == ALONE and not self._together:
            advice = _RUN_ALL_IN_FORWARD if several_processes else _RUN_ALL
            self._tell("alone", _ALONE.format(advice=advice if len(ran) == 1 else _SEVERAL_LOSSES))
        if ran and self._calls % CALLS == 0:
            missing = [task for task, latest in zip(self._tasks, self._latest) if latest <= self._calls - CALLS]
            if missing and not self._told & {"alone", "replaced"}:
                self._tell("tasks", _NEVER_RAN.format(tasks=missing))

    def waits(self, has_optimizer: bool) -> None:
        """Note a call in which an automatic strength is not found yet."""
        if self._since_step == WAITING:
            self._tell("waits", _WAITS.format(calls=self._since_step, advice="" if has_optimizer else _ATTACH))
        self._waited += 1
        if self._waited == CALLS and self._since_step < CALLS:
            self._tell("waits", _NOT_FOUND.format(calls=CALLS))

    def returned(self, penalty: Tensor) -> None:
        """Watch, until it has been seen once, whether a backward pass reaches what the calls return."""
        if self._differentiated or not penalty.requires_grad:
            return
        self._undifferentiated += 1
        if self._undifferentiated == CALLS:
            self._tell("backward", _NOT_DIFFERENTIATED)
        seen = self._differentiated
        penalty.register_hook(lambda _: None if seen else seen.append(True))  # type: ignore[no-untyped-call]

    def weighed_up(self, report: SaliencyReport, factor: float, strength: float) -> None:
        """Compare the penalty with the losses in one of the first calls that have them, at the strength after warm-up.

        ``factor`` is what a sum over some pairs of tasks stands for.
        """
        if report.losses is not None and (self._share is None or self._calls == CALLS):
            self._measure(report, factor)
        share = strength * (self._share or 0)
        weak = share < LEAST_SHARE and self._calls >= CALLS  # heads may begin near zero
        if share == 0 or "share" in self._told or not (share > MOST_SHARE or weak):
            return
        self._told.add("share")
        effect = "drowns them" if share > MOST_SHARE else "will hardly be felt"
        words = "The penalty is %.3g times the task losses with strength=%g, which %s. %s"
        logger.warning(words, share, strength, effect, strength_advice(strength / share))

    def _measure(self, report: SaliencyReport, factor: float) -> None:
        assert report.losses is not None
        pairs = torch.nan_to_num(report.distances * report.relations.to(report.distances), nan=0.0)
        share = factor * float(pairs.triu(1).sum()) / (abs(float(report.losses)) or torch.inf)
        if 0 < share < torch.inf or self._calls > 2:  # a few tries; each waits for the device
            self._share = share if 0 < share < torch.inf else 0.0

    def _ran(self, module: nn.Module, *_: Any) -> None:
        if self.enabled and module.training and torch.is_grad_enabled() and not in_backward():
            self._forwards_without_call += 1
            if self._forwards_without_call == CALLS:
                self._tell("not called", _NOT_CALLED.format(count=_FORWARDS))

    def _ran_over_a_sequence(self, *called: Any) -> None:
        mark_sequence_first(called[-1][0])

    def _check_places(self) -> None:
        for parent, key, child, path in self._places:
            holder = parent()
            now = None if holder is None else holder._modules.get(key)
            if now is not None and now is not child():
                self._places = []
                # A wrapper that runs the same module is no replacement; around a head, one that returns the same.
                if not derives_from(now, *_WRAPPERS) and (
                    path in self._heads or all(part is not child() for part in now.modules())
                ):
                    self._tell("replaced", _REPLACED.format(name=path, kind=type(now).__name__))
                return

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warn_user(message)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_tasks"])  # type: ignore[misc]  # earlier versions counted less
        vars(self).update(state)
