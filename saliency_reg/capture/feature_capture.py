"""What one forward pass leaves behind: the shared feature map, an alias of it per head, and the heads' outputs.

Each head is handed its own alias of the feature map, so that one autograd call returns the input gradient of every head.
The alias is a view: no copy. Under gradient surgery the aliases come from one fork, where the gradients of all tasks meet
again in the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..distributed.sharded_heads import ShardedHeads, is_sharded
from ..errors import AlreadyAttachedError, CaptureError, ConfigurationError, TaskError, WrongTypeError
from ..surgery.feature.combiner import ForkSurgery
from ..surgery.feature.fork import Anchor
from ..surgery.feature.forked import tensor_places
from ..surgery.feature.forked_aliases import Forking
from ..torch_tools.hooks import ModuleHooks, is_hooked
from .forward import (
    Call,
    Captured,
    Cut,
    Forward,
    HeadRun,
    SeenFeature,
    checked_forward,
    place_in_graph,
    version_of,
)
from .heads import Heads
from .lookup import find_module, first_few
from .nested import Item, contents, first_tensor, parse_feature, pick, put, put_argument

__all__ = ["FeatureCapture", "FeatureChoice"]

#: What the public ``feature=`` accepts.
FeatureChoice = Union[str, nn.Module, Sequence[Union[str, nn.Module]], None]


class FeatureCapture:
    """Hooks on a model that record the latest forward.

    A forward begins when the model is called, or, for models whose parts are called one by one, when a head runs
    that has run already. It is kept until it is read or until the next one with gradients begins.

    Args:
        model: the module whose call brackets a forward; may be a wrapper such as DistributedDataParallel.
        heads: its heads.
        feature: the module whose output (``"name"``, ``"name:output"``, ``"name:output.0"``) or input
            (``"name:input"``) is the feature map, or several of them; by default what the heads are called with.
        output: which part of what a head returns is its task's output, for all heads or ``{task: part}``.
        surgery: weighs the gradients that the heads send back.
        channel_axis: under surgery, of the feature map, to find the columns of a head that has one per task.
        run_all: heads that did not run in a forward are run when it is read, as those that did were called.
        keep: let the model keep this object alive.

    Raises:
        AlreadyAttachedError: a head is captured already.
        ConfigurationError: a ``DataParallel`` model.
        ModuleNotFoundInModelError, AmbiguousHeadsError: no such feature, or several.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Heads,
        feature: FeatureChoice = None,
        output: Item | Mapping[str, Item | None] | None = None,
        surgery: ForkSurgery | None = None,
        *,
        channel_axis: Any = None,
        run_all: bool = False,
        keep: bool = False,
    ) -> None:
        if isinstance(model, nn.DataParallel):
            raise ConfigurationError(
                "a DataParallel model runs copies of the heads, which cannot be captured. Use DistributedDataParallel, or "
                "pass model.module and run it unwrapped."
            )
        for name, module in zip(heads.names, heads.modules):
            if is_hooked(module):
                raise AlreadyAttachedError(
                    f"a regularizer or surgery is attached to head {name!r} already. Call .remove() on it first, or use it; "
                    "for a regularizer with surgery, type SaliencyRegularizer(..., surgery=PCGrad())."
                )
        #: Whether heads get aliases. Without (a penalty that is off), the model's graph is left exactly as it is.
        self.fork = True
        self.enabled = True
        self.heads = heads
        self.run_all = run_all
        self._output_items = _items_per_head(output, heads)
        if surgery is not None and heads.columns and any(map(callable, self._output_items[0])):
            raise ConfigurationError(
                "under surgery the output of a head with a column per task is watched, which a function of what it returns "
                "does not allow. Type a key, an attribute or an index as output=, or choose the module that returns them."
            )
        self._forking = None if surgery is None else Forking(surgery, heads, feature is not None, channel_axis)
        self.sharded = ShardedHeads(model, heads.modules)
        self._latest: Forward | None = None
        self._why_none = "the model has not run a forward yet. Call the model before the regularizer"
        self._running = False  # the model's own forward
        self._exception_before: object = None
        self._hooks = ModuleHooks(self, keep)
        chosen = [] if feature is None else [feature] if isinstance(feature, (str, nn.Module)) else list(feature)
        self._places = [parse_feature(one) for one in chosen]
        found = [find_module(model, place.module, "feature") for place in self._places]
        self.feature_names = [name + place.suffix for (name, _), place in zip(found, self._places)]
        if len(set(self.feature_names)) < len(self.feature_names):
            raise ConfigurationError(f"feature= names a feature map twice: {self.feature_names}. Name each once.")
        # Nothing is set on the model before everything has been checked.
        # Before FSDP2 gathers what this may free.
        self._hooks.before(model, self._before_model, first=is_sharded(model))
        self._hooks.after(model, self._after_model, always=True)
        for index, ((_, module), place) in enumerate(zip(found, self._places)):
            if place.port == "output":
                self._hooks.after(module, self._after_feature, index)
            else:
                self._hooks.before(module, self._before_feature, index)
        for index, module in enumerate(heads.modules):
            # FSDP2 hands each head a tensor of its own, which comes from the shared one.
            self._hooks.before(module, self._before_head, index, first=is_sharded(module))
            self._hooks.after(module, self._after_head, index)

    def remove(self) -> None:
        """Take all hooks off and forget the latest forward."""
        self._hooks.remove()
        self._forget()
        self._why_none = "the regularizer was removed from the model. Build a new SaliencyRegularizer"

    def drop(self) -> None:
        """Forget the latest forward. One without gradients stays: it holds nothing."""
        if self._latest is not None and self._latest.active:
            self._forget()
            self._why_none = "the latest forward was dropped by a call without gradients. Call the model again"

    def describe(self) -> tuple[str, str]:
        """Heads and feature, for a person."""
        names = self.heads.names
        heads = f"{names[0]!r}, one column per task" if self.heads.columns else first_few(names)
        return heads, ", ".join(self.feature_names) or "what the heads are called with"

    def device(self) -> torch.device | None:
        """The device of the heads, if they have parameters."""
        parameter = next((p for head in self.heads.modules for p in head.parameters()), None)
        return None if parameter is None else parameter.device

    def take(self) -> list[Captured] | None:
        """Return the feature maps of the latest forward and release it; ``None`` if it ran without gradients.

        Raises:
            NoHeadRanError: the forward was one without heads.
            CaptureError: there is no unread forward, or it cannot be used; the message says why.
        """
        forward = self._latest
        if forward is None:
            raise CaptureError(f"{self._why_none}. It reads each forward once.")
        if not forward.active:
            return None
        if self.run_all:
            self._run_others(forward)
        cuts, fork = self._cuts(forward), None if self._forking is None else self._forking.fork
        self._forget()
        self._running = False
        self._why_none = "the latest forward was read already: call the model once before each call of the regularizer"
        captured = checked_forward(forward, self.heads, self.feature_names)
        for one in captured or ():
            one.cuts, one.fork = cuts, fork
        return captured

    def _run_others(self, forward: Forward) -> None:
        """Call the heads that did not run; what they draw is drawn apart from the model's random numbers."""
        call = forward.call
        if call is None or forward.problem is not None:
            return
        tensors = [one for one in (*call.args, *call.kwargs.values()) if isinstance(one, Tensor)]
        devices = sorted({one.device.index for one in tensors if one.device.type == "cuda"})
        autocast = nullcontext() if call.autocast is None else torch.autocast(*call.autocast)
        self._running = True  # it is no new forward
        with torch.random.fork_rng(devices=devices), autocast:
            for index, module in enumerate(self.heads.modules):
                if index not in forward.runs:
                    with _buffers_kept(module):
                        module(*call.args, **call.kwargs)

    def _cuts(self, forward: Forward) -> list[Cut]:
        named = [
            Cut([seen.edge], seen.anchor)
            for seen in forward.features.values()
            if seen.edge is not None and seen.anchor is not None
        ]
        return named + ([] if self._forking is None else self._forking.cuts)

    def _forget(self) -> None:
        self._latest = None
        if self._forking is not None:
            self._forking.forget()

    # What the hooks call, in the order in which a forward runs.

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.enabled or _in_backward():
            return
        self._running = True
        self.sharded.release()
        self._exception_before = sys.exc_info()[1]
        # A forward without gradients (an evaluation, a teacher's) does not displace one that waits to be read.
        if torch.is_grad_enabled() or self._latest is None or not self._latest.active:
            self._begin()

    def _after_model(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._running or _in_backward():
            return
        self._running = False
        exception = sys.exc_info()[1]
        if exception is not None and exception is not self._exception_before:
            self._forget()
            self._why_none = "the latest forward raised an exception. Call the model again"
        elif self._latest is not None:
            self._latest.complete = bool(self._latest.runs)

    def _after_feature(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        items = self._places[index].items
        replaced = self._on_feature(index, pick(output, items), output)
        return None if replaced is None else put(output, items, replaced)

    def _before_feature(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        items = self._places[index].items
        if not items:
            place = first_tensor(args, kwargs)
            items = () if place is None else (place,)
        whole = args if items and isinstance(items[0], int) else kwargs
        replaced = self._on_feature(index, pick(whole, items) if items else None, whole)
        return None if replaced is None else put_argument(args, kwargs, items, replaced)

    def _on_feature(self, index: int, feature: Any, whole: Any) -> Tensor | None:
        """Note a named feature; return what takes its place if it had to be made to require grad."""
        if not self._records():
            # A recomputation has to take the same way as the forward did.
            return self._require_grad(feature) if self._live() and isinstance(feature, Tensor) else None
        forward = self._current()
        if not self._running and forward.runs:
            forward = self._begin()
        if not isinstance(feature, Tensor) or not feature.is_floating_point():
            forward.problem = (
                f"the feature {self.feature_names[index]!r} is a {type(feature).__name__}, expected a floating-point "
                f"tensor; found {contents(whole)}. Name the part that is one, e.g. 'encoder:output.0' or "
                "'encoder:output.last_hidden_state'."
            )
            return None
        replaced = self._require_grad(feature)
        anchor = None
        forking = self._operating()
        if replaced is None and self.fork and forking is not None and feature.requires_grad:
            replaced, anchor = Anchor.apply(forking.surgery, feature)
        seen = feature if replaced is None else replaced
        forward.features[index] = SeenFeature(seen, place_in_graph(seen), version_of(seen), anchor)
        return replaced

    def _before_head(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._live():
            if self.enabled and not _in_backward() and not self._running and self._latest is None:
                self._latest = Forward(active=False)
            return None
        place = first_tensor(args, kwargs)
        source: Tensor | None = None if place is None else args[place] if isinstance(place, int) else kwargs[place]
        records = self._records()
        if records:
            self._before_recorded_head(index)
            if self.run_all and source is not None and self._current().call is None:
                self._current().call = _call_of(args, kwargs, source)
        forking = self._operating()
        if forking is not None and not records:
            forking.check_recomputation(index)
        elif forking is not None:
            forking.runs(index)
            if any(tensor.requires_grad for _, tensor in tensor_places(args, kwargs)):
                forward = self._current()
                features = [forward.features[feature].tensor for feature in sorted(forward.features)]
                forward.runs[index], args, kwargs = forking.hand_out(index, source, features, args, kwargs)
                forward.forked = True
                return args, kwargs
        if source is None or place is None:
            if records:
                self._current().runs[index] = HeadRun(None, None, None, -1)
            return None
        source_edge = place_in_graph(source)
        alias = self._require_grad(source)
        if alias is None:
            alias = source.view_as(source) if self.fork and source.requires_grad else source
        if records:
            forward = self._current()
            for run in forward.runs.values():
                if run.source is source:
                    source_edge = run.source_edge
            forward.forked = forward.forked or alias is not source
            forward.runs[index] = HeadRun(source, source_edge, place_in_graph(alias), version_of(source))
        return None if alias is source else put_argument(args, kwargs, (place,), alias)

    def _before_recorded_head(self, index: int) -> None:
        """Begin a forward where the model is not called as a whole; note what cannot be used."""
        forward = self._current()
        if not self._running and self._forking is not None and self._forking.done:
            self._begin()
        elif not self._running and forward.complete:
            self._begin().displaced = len(forward.runs)
        elif not self._running and index in forward.runs:
            self._begin()
        elif index in forward.runs:
            forward.problem = (
                f"head {self.heads.names[index]!r} ran twice in one forward, so its output is not one per sample. Call "
                "the model once per view, or pass regularizer(outputs=..., features=...)."
            )

    def _after_head(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        run = self._latest.runs.get(index) if self._latest is not None and self._records() else None
        if run is None:
            return None
        items = self._output_items[index]
        run.output = pick(output, items)
        run.whole = not items
        if run.output is None and items and self._latest is not None:
            self._latest.problem = (
                f"output={items[0]!r} is no part of what head {self.heads.names[index]!r} returned: {contents(output)}. "
                "Type a key, an attribute or an index of it."
            )
        run.output_version = version_of(run.output) if isinstance(run.output, Tensor) else -1
        run.changed_source = run.source is not None and version_of(run.source) != run.version
        if self._forking is None:
            return None
        feature = self._current().features.get(0)
        named = None if feature is None else feature.tensor
        return self._forking.after_head(index, output, run, items, named, self.fork)

    def _operating(self) -> Forking | None:
        return self._forking if self._forking is not None and self._forking.operates else None

    def _live(self) -> bool:
        return self.enabled and torch.is_grad_enabled()

    def _records(self) -> bool:
        """Checkpointing runs modules again during the backward pass: that is no new forward."""
        return self._live() and not _in_backward()

    def _current(self) -> Forward:
        latest = self._latest
        return latest if latest is not None and latest.active else self._begin()

    def _begin(self) -> Forward:
        self._latest = Forward(active=torch.is_grad_enabled())
        if self._forking is not None:
            self._forking.begin(self._latest.active)
        return self._latest

    def _require_grad(self, tensor: Tensor) -> Tensor | None:
        """Behind a frozen backbone: the same values as a tensor that requires grad, if any head can be trained."""
        if tensor.requires_grad or not any(p.requires_grad for head in self.heads.modules for p in head.parameters()):
            return None
        alias: Tensor = _RequireGrad.apply(tensor, torch.empty(0, device=tensor.device, requires_grad=True))
        return alias


class _RequireGrad(torch.autograd.Function):
    """The identity, with an output that requires grad although the input does not. Nothing is accumulated."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        """The same values; the anchor is what makes the output require grad."""
        # detach shares the memory without being a view to autograd: heads may work on it in place, as before.
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        """Nothing in front of here is trained."""
        return None, None


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Within, running statistics are copies, so that samples of another task do not move them."""
    before = [(own, name, buffer) for own in module.modules() for name, buffer in own._buffers.items()]
    try:
        for own, name, buffer in before:
            own._buffers[name] = None if buffer is None else buffer.clone()
        yield
    finally:
        for own, name, buffer in before:
            own._buffers[name] = buffer


def _call_of(args: Any, kwargs: Any, source: Tensor) -> Call:
    kind = source.device.type
    if not torch.amp.is_autocast_available(kind):
        return Call(tuple(args), dict(kwargs), None)
    return Call(tuple(args), dict(kwargs), (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)))


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _items_per_head(output: Item | Mapping[str, Item | None] | None, heads: Heads) -> list[tuple[Item, ...]]:
    if isinstance(output, Mapping):
        if heads.columns or set(output) != set(heads.tasks):
            raise TaskError(
                f"output= names {list(output)}, but the tasks are {list(heads.tasks)}. Give a part for each head (None for "
                "all of it), or one for all heads: output='logits'."
            )
        parts = [output[task] for task in heads.tasks]
    else:
        parts = [output] * len(heads.modules)
    for part in parts:
        if isinstance(part, bool) or not (part is None or callable(part) or isinstance(part, (int, str))):
            raise WrongTypeError(
                f"output= must be a key, an attribute, an index or a function, found {type(part).__name__}."
            )
    return [() if part is None else (part,) for part in parts]
