"""What one forward pass leaves behind, and whether it can be differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..errors import CaptureError, NoHeadRanError
from ..saliency.task_saliencies import Feature
from ..surgery.feature.fork import Fork
from .heads import Heads

__all__ = [
    "Call",
    "Captured",
    "Cut",
    "Forward",
    "HeadRun",
    "SeenFeature",
    "checked_forward",
    "place_in_graph",
    "same_tensor",
    "version_of",
]


@dataclass
class HeadRun:
    """One head's part in a forward."""

    source: Tensor | None  # the tensor that the head was called with
    source_edge: Feature | None  # its place in the graph before any head ran on it
    edge: Feature | None  # the place of the alias that the head read
    version: int  # of the source, before this head ran
    output: Any = None
    output_version: int = -1
    changed_source: bool = False
    whole: bool = True  # the output is all that the head returned


@dataclass
class Call:
    """How a head was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype, bool] | None  # kind of device, number format, whether it was on


@dataclass
class SeenFeature:
    """A named feature map."""

    tensor: Tensor
    edge: Feature | None
    version: int
    anchor: Tensor | None = None  # where a gradient gets in that was computed before the backward pass


@dataclass
class Cut:
    """Where the penalty's graph is cut: its gradient there is taken at once, and let in again at the anchor."""

    edges: list[Feature]
    anchor: Tensor


@dataclass
class Forward:
    """What the hooks saw in one forward."""

    active: bool
    runs: dict[int, HeadRun] = field(default_factory=dict)
    features: dict[int, SeenFeature] = field(default_factory=dict)
    forked: bool = False
    complete: bool = False  # the model's own forward has ended with heads in it
    call: Call | None = None  # how a head was called, to call the others like it
    displaced: int = 0  # number of heads in the unread forward that heads called one by one put an end to
    problem: str | None = None


@dataclass
class Captured:
    """One feature map of a forward, checked and ready to be differentiated."""

    feature: Tensor
    present: list[int]  # indices of the heads that ran
    outputs: list[Tensor]  # one per head that ran
    edges: list[list[Feature]]  # one list per head that ran: the places whose gradients add up to its saliency
    separate: bool  # whether each head has an alias of its own
    direct: bool  # whether the heads read the feature map itself
    # Under surgery:
    cuts: list[Cut] = field(default_factory=list)  # of the whole forward
    fork: Fork | None = None


def checked_forward(forward: Forward, heads: Heads, feature_names: Sequence[str]) -> list[Captured] | None:
    """One :class:`Captured` per feature map; ``None`` if the outputs carry no graph.

    Raises:
        NoHeadRanError: no head ran in it.
        CaptureError: the forward cannot be used; the message says why.
    """
    if forward.problem is not None:
        raise CaptureError(forward.problem)
    names = heads.names
    present = sorted(forward.runs)
    if not present:
        raise NoHeadRanError(
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
    ran = [names[index] for index in present]
    if not _have_graphs(runs, ran):
        return None
    outputs = [run.output for run in runs]
    if not feature_names:
        return [_what_the_heads_read(forward, runs, ran, present)]
    if missing := [name for index, name in enumerate(feature_names) if index not in forward.features]:
        raise CaptureError(
            f"the feature {missing[0]!r} did not run with gradients in the latest forward. Choose a module that the "
            "forward calls as a module; inside a checkpoint, use_reentrant=False is needed."
        )
    captured = []
    for index, name in enumerate(feature_names):
        feature = forward.features[index]
        # The same memory in another version is another tensor: an in-place ReLU came in between.
        if all(
            run.source is not None and same_tensor(run.source, feature.tensor) for run in runs
        ) and feature.version == min(run.version for run in runs):
            captured.append(_what_the_heads_read(forward, runs, ran, present))
            continue
        if feature.edge is None:
            raise CaptureError(f"the feature {name!r} does not require grad, and no head can be trained.")
        edges = [[feature.edge] for _ in runs]
        captured.append(Captured(feature.tensor, present, outputs, edges, separate=False, direct=False))
    return captured


def _have_graphs(runs: Sequence[HeadRun], names: Sequence[str]) -> bool:
    for name, run in zip(names, runs):
        if not isinstance(run.output, Tensor):
            raise CaptureError(
                f"head {name!r} returned {type(run.output).__name__}, expected a tensor. Say which part it is with "
                "output='logits' (a key or attribute), output=0 (an index) or a function, or choose the module whose "
                "output is the tensor."
            )
        if not run.output.is_floating_point():
            raise CaptureError(
                f"the output of head {name!r} is {run.output.dtype}, which has no gradient. Choose the module that returns "
                "the logits, or say which part they are with output=."
            )
        if run.output_version != version_of(run.output):
            raise CaptureError(
                f"the output of head {name!r} was changed in place after the head returned it (sigmoid_(), +=, ...). "
                "Use the operation that makes a new tensor."
            )
    if without := [name for name, run in zip(names, runs) if not run.output.requires_grad]:
        if len(without) == len(names):
            return False
        raise CaptureError(
            f"the outputs of heads {without} carry no graph, those of the others do. Do not run single heads under "
            "no_grad."
        )
    return True


def _what_the_heads_read(
    forward: Forward, runs: Sequence[HeadRun], names: Sequence[str], present: list[int]
) -> Captured:
    sources = [run.source for run in runs if run.source is not None]
    if len(sources) < len(runs):
        name = next(name for name, run in zip(names, runs) if run.source is None)
        raise CaptureError(
            f"head {name!r} was called without a floating-point tensor. Name the feature map, e.g. feature='backbone', "
            "choose the module that reads it, or pass regularizer(outputs=..., features=...)."
        )
    if not all(same_tensor(source, sources[0]) for source in sources):
        shapes = {name: list(source.shape) for name, source in zip(names, sources)}
        raise CaptureError(
            f"the heads do not read the same tensor: {_shortened(shapes)}. Name the module whose output they share, "
            "e.g. feature='backbone', or 'pool:input' for the input of a module."
        )
    # Heads that work in place write into the shared tensor: their aliases are not where they started.
    changed = any(run.changed_source for run in runs)
    separate = forward.forked and not (changed and runs[0].source_edge is not None)
    places = [run.edge if separate else run.source_edge for run in runs]
    edges = [[place] for place in places if place is not None]
    outputs = [run.output for run in runs]
    direct = not changed and all(run.whole for run in runs)
    return Captured(sources[0], present, outputs, edges, separate=separate, direct=direct)


def place_in_graph(tensor: Tensor) -> Feature | None:
    """Where the tensor is in the graph now: an in-place operation later on does not change that."""
    if not tensor.requires_grad:
        return None
    return tensor if tensor.is_leaf else get_gradient_edge(tensor)


def version_of(tensor: Tensor) -> int:
    """Counts in-place changes."""
    return -1 if tensor.is_inference() else tensor._version


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """One tensor, or two views of the same entries (each head may flatten the map on its own)."""
    return a is b or (
        a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.device == b.device
    )


def _shortened(shapes: dict[str, list[int]], most: int = 4) -> str:
    shown = ", ".join(f"{name} reads {shape}" for name, shape in list(shapes.items())[:most])
    return shown + (f" and {len(shapes) - most} more" if len(shapes) > most else "")
