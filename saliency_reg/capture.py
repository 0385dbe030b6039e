"""What one forward pass leaves behind: the shared feature map, an alias of it per head, and the heads' outputs.

The fork. Each head is handed its own alias of the feature map, so that one autograd call returns the input gradient
of every head, and so that the backward pass meets the gradient of each task on its own. The alias is a view: no copy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from .errors import AlreadyAttachedError, CaptureError, ConfigurationError
from .heads import Heads
from .hooks import ModuleHooks, is_hooked
from .lookup import find_module, first_few
from .saliency import Feature

__all__ = ["Captured", "FeatureCapture"]


@dataclass
class HeadRun:
    """One head's part in a forward."""

    source: Tensor  # the tensor that the head was called with
    source_edge: Feature | None  # its place in the graph before any head ran on it
    edge: Feature | None  # the place of the alias that the head read
    version: int  # of the source, before this head ran
    output: Any = None
    output_version: int = -1
    changed_source: bool = False


@dataclass
class Forward:
    """What the hooks saw in one forward."""

    active: bool
    runs: dict[int, HeadRun] = field(default_factory=dict)
    feature: Tensor | None = None  # of the named module, if one was named
    feature_edge: Feature | None = None
    feature_version: int = -1
    forked: bool = False
    complete: bool = False  # the model's own forward has ended with heads in it
    displaced: int = 0  # number of heads in the unread forward that heads called one by one put an end to
    problem: str | None = None


@dataclass
class Captured:
    """A forward, checked and ready to be differentiated."""

    feature: Tensor
    present: list[int]  # indices of the heads that ran
    outputs: list[Tensor]  # one per head that ran
    edges: list[list[Feature]]  # one list per head that ran: the places whose gradients add up to its saliency
    separate: bool  # whether each head has an alias of its own
    direct: bool  # whether the heads read the feature map itself


class FeatureCapture:
    """Hooks on a model that record the latest forward.

    A forward begins when the model is called, or, for models whose parts are called one by one, when a head runs
    that has run already. It is kept until it is read or until the next one with gradients begins.

    Args:
        model: the module whose call brackets a forward; may be a wrapper such as DistributedDataParallel.
        heads: its heads.
        feature: the module whose output (``"name"``, ``"name:output"``) or input (``"name:input"``) is the feature
            map; by default what the heads are called with.

    Raises:
        AlreadyAttachedError: a head is captured already.
        ConfigurationError: a ``DataParallel`` model.
        ModuleNotFoundInModelError, AmbiguousHeadsError: no such feature, or several.
    """

    def __init__(self, model: nn.Module, heads: Heads, feature: str | nn.Module | None = None) -> None:
        if isinstance(model, nn.DataParallel):
            raise ConfigurationError(
                "a DataParallel model runs copies of the heads, which cannot be captured. Use DistributedDataParallel, or "
                "pass model.module and run it unwrapped."
            )
        for name, module in zip(heads.names, heads.modules):
            if is_hooked(module):
                raise AlreadyAttachedError(
                    f"a regularizer is attached to head {name!r} already. Call .remove() on it first, or use it."
                )
        port = "output"
        if isinstance(feature, str) and ":" in feature:
            feature, _, port = feature.rpartition(":")
            if port not in ("input", "output"):
                raise ConfigurationError(
                    f"feature= ends in ':{port}'. Type '{feature}:output' (the default) or '{feature}:input'."
                )
        self.feature_name: str | None = None
        #: Whether heads get aliases. Without (a penalty that is off), the model's graph is left exactly as it is.
        self.fork = True
        self.enabled = True
        self.heads = heads
        self._latest: Forward | None = None
        self._why_none = "the model has not run a forward yet. Call the model before the regularizer"
        self._running = False  # the model's own forward
        self._exception_before: object = None
        self._hooks = ModuleHooks(self)
        feature_module: nn.Module | None = None
        if feature is not None:
            name, feature_module = find_module(model, feature, "feature")
            self.feature_name = f"{name}:{port}"
        # Nothing is set on the model before everything has been checked.
        self._hooks.before(model, self._before_model)
        self._hooks.after(model, self._after_model, always=True)
        if feature_module is not None and port == "output":
            self._hooks.after(feature_module, self._after_feature)
        elif feature_module is not None:
            self._hooks.before(feature_module, self._before_feature)
        for index, module in enumerate(heads.modules):
            self._hooks.before(module, self._before_head, index)
            self._hooks.after(module, self._after_head, index)

    def remove(self) -> None:
        """Take all hooks off and forget the latest forward."""
        self._hooks.remove()
        self._latest = None
        self._why_none = "the regularizer was removed from the model. Build a new SaliencyRegularizer"

    def drop(self) -> None:
        """Forget the latest forward. One without gradients stays: it holds nothing."""
        if self._latest is not None and self._latest.active:
            self._latest = None
            self._why_none = "the latest forward was dropped by a call without gradients. Call the model again"

    def describe(self) -> tuple[str, str]:
        """Heads and feature, for a person."""
        names = self.heads.names
        heads = f"{names[0]!r}, one column per task" if self.heads.columns else first_few(names)
        return heads, self.feature_name or "what the heads are called with"

    def device(self) -> torch.device | None:
        """The device of the heads, if they have parameters."""
        parameter = next((p for head in self.heads.modules for p in head.parameters()), None)
        return None if parameter is None else parameter.device

    def take(self) -> Captured | None:
        """Return the latest forward and release it; ``None`` if it ran without gradients.

        Raises:
            CaptureError: there is no unread forward, or it cannot be used; the message says why.
        """
        forward = self._latest
        if forward is None:
            raise CaptureError(f"{self._why_none}. It reads each forward once.")
        if not forward.active:
            return None
        self._latest, self._running = None, False
        self._why_none = "the latest forward was read already: call the model once before each call of the regularizer"
        return self._checked(forward)

    def _checked(self, forward: Forward) -> Captured | None:
        if forward.problem is not None:
            raise CaptureError(forward.problem)
        names = self.heads.names
        present = sorted(forward.runs)
        if not present:
            raise CaptureError(
                f"no head ran in the latest forward; the heads are {list(names)}. Choose heads that the model's forward "
                "calls as modules, head(feature), not inside a reentrant checkpoint (type use_reentrant=False), or pass "
                "regularizer(outputs=..., features=...)."
            )
        if len(present) < forward.displaced:
            raise CaptureError(
                f"heads {[names[index] for index in present]} ran again on their own after the model's forward, which had "
                "not been read. Call regularizer() right after the model, before heads are called on their own."
            )
        runs = [forward.runs[index] for index in present]
        for index, run in zip(present, runs):
            if not isinstance(run.output, Tensor):
                raise CaptureError(
                    f"head {names[index]!r} returned {type(run.output).__name__}, expected a tensor. Choose the module "
                    "whose output is the tensor, or pass regularizer(outputs={...}, features=...)."
                )
            if run.output_version != _version(run.output):
                raise CaptureError(
                    f"the output of head {names[index]!r} was changed in place after the head returned it (sigmoid_(), "
                    "+=, ...). Use the operation that makes a new tensor."
                )
        if not all(run.output.requires_grad for run in runs):
            if any(run.output.requires_grad for run in runs):
                without = [names[index] for index, run in zip(present, runs) if not run.output.requires_grad]
                raise CaptureError(
                    f"the outputs of heads {without} carry no graph, those of the others do. Do not run single heads "
                    "under no_grad."
                )
            return None
        outputs = [run.output for run in runs]
        if self.feature_name is not None and forward.feature is None:
            raise CaptureError(
                f"the feature {self.feature_name!r} did not run with gradients in the latest forward. Choose a module that "
                "the forward calls as a module; inside a checkpoint, use_reentrant=False is needed."
            )
        one_source = all(_same_tensor(run.source, runs[0].source) for run in runs)
        # The same memory in another version is another tensor: an in-place ReLU came in between.
        if forward.feature is not None and not (
            one_source
            and _same_tensor(forward.feature, runs[0].source)
            and forward.feature_version == min(run.version for run in runs)
        ):
            if forward.feature_edge is None:
                raise CaptureError(
                    f"the feature {self.feature_name!r} does not require grad, and no head can be trained."
                )
            edges = [[forward.feature_edge] for _ in runs]
            return Captured(forward.feature, present, outputs, edges, separate=False, direct=False)
        if not one_source:
            shapes = {names[index]: list(run.source.shape) for index, run in zip(present, runs)}
            raise CaptureError(
                f"the heads do not read the same tensor: {_shortened(shapes)}. Name the module whose output they share, "
                "e.g. feature='backbone', or 'pool:input' for the input of a module."
            )
        # Heads that work in place write into the shared tensor: their aliases are not where they started.
        changed = any(run.changed_source for run in runs)
        separate = forward.forked and not (changed and runs[0].source_edge is not None)
        places = [run.edge if separate else run.source_edge for run in runs]
        edges = [[place] for place in places if place is not None]
        return Captured(runs[0].source, present, outputs, edges, separate=separate, direct=not changed)

    # What the hooks call, in the order in which a forward runs.

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.enabled or _in_backward():
            return
        self._running = True
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
            self._latest = None
            self._why_none = "the latest forward raised an exception. Call the model again"
        elif self._latest is not None:
            self._latest.complete = bool(self._latest.runs)

    def _after_feature(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._on_feature(output)

    def _before_feature(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        place = _first_tensor(args, kwargs)
        if place is None:
            return self._on_feature(None)
        replaced = self._on_feature(_at(place, args, kwargs))
        return None if replaced is None else _replace(place, args, kwargs, replaced)

    def _on_feature(self, feature: Any) -> Tensor | None:
        """Note the named feature; return what takes its place if it had to be made to require grad."""
        if not self._records():
            # A recomputation has to take the same way as the forward did.
            return self._require_grad(feature) if self._live() and isinstance(feature, Tensor) else None
        forward = self._current()
        if not self._running and forward.runs:
            forward = self._begin()
        if not isinstance(feature, Tensor) or not feature.is_floating_point():
            forward.problem = (
                f"the feature {self.feature_name!r} is a {type(feature).__name__}, expected a floating-point tensor. Name a "
                "module whose output (or first input) is the tensor itself."
            )
            return None
        replaced = self._require_grad(feature)
        forward.feature = feature if replaced is None else replaced
        forward.feature_edge = _edge(forward.feature)
        forward.feature_version = _version(forward.feature)
        return replaced

    def _before_head(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self._live():
            if self.enabled and not _in_backward() and not self._running and self._latest is None:
                self._latest = Forward(active=False)
            return None
        place = _first_tensor(args, kwargs)
        records = self._records()
        if place is None:
            if records:
                self._current().problem = (
                    f"head {self.heads.names[index]!r} was called without a floating-point tensor. Choose the module that "
                    "reads the feature map, or pass regularizer(outputs=..., features=...)."
                )
            return None
        source = _at(place, args, kwargs)
        if records:
            self._before_recorded_head(index)
        source_edge = _edge(source)
        alias = self._require_grad(source)
        if alias is None:
            alias = source.view_as(source) if self.fork and source.requires_grad else source
        if records:
            forward = self._current()
            for run in forward.runs.values():
                if run.source is source:
                    source_edge = run.source_edge
            forward.forked = forward.forked or alias is not source
            forward.runs[index] = HeadRun(source, source_edge, _edge(alias), _version(source))
        return None if alias is source else _replace(place, args, kwargs, alias)

    def _before_recorded_head(self, index: int) -> None:
        """Begin a forward where the model is not called as a whole; note what cannot be used."""
        forward = self._current()
        if not self._running and forward.complete:
            self._begin().displaced = len(forward.runs)
        elif not self._running and index in forward.runs:
            self._begin()
        elif index in forward.runs:
            forward.problem = (
                f"head {self.heads.names[index]!r} ran twice in one forward, so its output is not one per sample. Call "
                "the model once per view, or pass regularizer(outputs=..., features=...)."
            )

    def _after_head(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        run = self._latest.runs.get(index) if self._latest is not None and self._records() else None
        if run is not None:
            run.output = output
            run.output_version = _version(output) if isinstance(output, Tensor) else -1
            run.changed_source = _version(run.source) != run.version

    def _live(self) -> bool:
        return self.enabled and torch.is_grad_enabled()

    def _records(self) -> bool:
        """Checkpointing runs modules again during the backward pass: that is no new forward."""
        return self._live() and not _in_backward()

    def _current(self) -> Forward:
        latest = self._latest
        return latest if latest is not None and latest.active else self._begin()

    def _begin(self) -> Forward:
        self._latest = forward = Forward(active=torch.is_grad_enabled())
        return forward

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
        # detach shares the memory without being a view to autograd: heads may work on it in place, as before.
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _edge(tensor: Tensor) -> Feature | None:
    """Where the tensor is in the graph now: an in-place operation later on does not change that."""
    if not tensor.requires_grad:
        return None
    return tensor if tensor.is_leaf else get_gradient_edge(tensor)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """One tensor, or two views of the same entries (each head may flatten the map on its own)."""
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.device == b.device
    )


def _first_tensor(args: Sequence[Any], kwargs: dict[str, Any]) -> int | str | None:
    """Position or name of the first floating-point tensor argument."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor) and value.is_floating_point():
            return place
    return None


def _at(place: int | str, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = args[place] if isinstance(place, int) else kwargs[place]
    return found


def _replace(place: int | str, args: Sequence[Any], kwargs: dict[str, Any], tensor: Tensor) -> tuple[Any, Any]:
    if isinstance(place, int):
        return (*args[:place], tensor, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: tensor}


def _shortened(shapes: dict[str, list[int]], most: int = 4) -> str:
    shown = ", ".join(f"{name} reads {shape}" for name, shape in list(shapes.items())[:most])
    return shown + (f" and {len(shapes) - most} more" if len(shapes) > most else "")
