"""One forward: as the hooks record it, and as it is captured, checked and ready to be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, NoHeadRanError
from ..torch_tools import Edge, same_tensor, version_of
from .column_groups import ColumnGroups
from .heads import Heads, of_methods
from .linear import Weight
from .lookup import listed

_NAME_IT = "Name the module whose output they share, e.g. feature='backbone'"


@dataclass
class HeadRun:
    """One head's part in a forward."""

    name: str
    source: Tensor | None  # the tensor that the head was called with
    source_edge: Edge | None  # where that was in the graph before any head ran on it
    version: int  # of the source, before this head ran
    edge: Edge | None = None  # of the alias that the head read
    output: Any = None
    output_version: int = -1
    changed_source: bool = False
    whole: bool = True  # the output is all that the head returned, and the head is one module
    weight: Weight = None  # of a plain Linear, when it ran
    ended: bool = False  # a head of several modules may begin, and not end
    goes_on: bool = False  # another module is reading its output


@dataclass
class SeenFeature:
    """A named feature map."""

    tensor: Tensor
    edge: Edge | None
    version: int
    made_by: nn.Module | None = None  # whose output it is


@dataclass
class RecordedForward:
    """What the hooks saw in one forward."""

    active: bool
    runs: dict[int, HeadRun] = field(default_factory=dict)
    features: dict[int, SeenFeature] = field(default_factory=dict)
    aliased: bool = False  # heads were handed aliases
    complete: bool = False  # the model's own forward has ended with heads in it
    # How a head was called (args, kwargs, autocast), to call the others like it.
    call: tuple[Any, Any, AbstractContextManager[Any]] | None = None
    # Heads in the unread forward that this one replaced, because a head was called outside the model.
    displaced: int = 0
    problem: str | None = None
    returned: Any = None  # by the model, where it is to be looked at


@dataclass
class FeatureMap:
    """One feature map, and where its gradients are taken."""

    tensor: Tensor
    edges: Sequence[Edge]  # one per head that ran
    separate: bool  # whether each head has an alias of its own
    direct: bool  # whether the heads read the feature map itself
    made_by: nn.Module | None = None  # the module that returned it, where that is known
    batch_axis: int = 0


@dataclass
class CapturedForward:
    """One forward, ready to be differentiated."""

    ran: list[int]  # indices of the heads that ran
    outputs: list[Tensor]  # one for each of them
    features: list[FeatureMap]  # at least one, unless no head ran
    device: torch.device  # of the feature maps, or else of the heads
    modules: Sequence[nn.Module] = ()  # the heads; a single one if ``columns``, none where outputs were passed by hand
    columns: bool = False  # whether a single module has the outputs of all tasks
    groups: ColumnGroups | None = None  # which of its columns are those of each task, if not one each
    carried: Any = None  # what the aliases left with this forward; only those who made them know
    weights: Sequence[Weight] = ()  # of plain Linear heads, when they ran
    no_heads: NoHeadRanError | None = None  # why there is nothing in it; only where other processes may have more

    @property
    def batch_size(self) -> int:
        """Samples in the first feature map; 0 in a forward without heads."""
        return self.features[0].tensor.shape[self.features[0].batch_axis] if self.features else 0

    def tasks(self, num_tasks: int) -> Sequence[int]:
        """Return the tasks that can have a saliency: all columns of a single head, or the heads that ran."""
        return range(num_tasks) if self.columns and self.ran else self.ran


def checked_forward(
    recorded: RecordedForward,
    heads: Heads,
    feature_names: Sequence[str],
    carried: Any,
    shared: Callable[[Sequence[Tensor]], str],
) -> CapturedForward | None:
    """Return what was recorded if it can be used, ``None`` if the outputs carry no graph; else raise a CaptureError.

    ``shared`` says which modules tensors have in common.
    """
    if recorded.problem is not None:
        raise CaptureError(recorded.problem)
    ran = sorted(index for index, run in recorded.runs.items() if run.ended)
    runs = [recorded.runs[index] for index in ran]
    if not runs:
        raise NoHeadRanError(
            f"no head ran in the latest forward; the heads are {list(heads.names)}. Choose heads that the model's forward "
            "calls as modules, head(feature), not inside a reentrant checkpoint (pass use_reentrant=False), or pass "
            f"regularizer(outputs=..., features=...).{of_methods(heads)}"
        )
    if len(runs) < recorded.displaced:
        raise CaptureError(
            f"heads {[run.name for run in runs]} ran again on their own after the model's forward, which had "
            "not been read. Call regularizer() right after the model, before heads are called on their own."
        )
    if not _have_graphs(runs):
        return None
    if missing := [name for index, name in enumerate(feature_names) if index not in recorded.features]:
        raise CaptureError(
            f"the feature {missing[0]!r} did not run with gradients in the latest forward. Choose a module that the "
            "forward calls as a module; inside a checkpoint, use_reentrant=False is needed."
        )
    features = []
    for index, name in enumerate(feature_names):
        seen = recorded.features[index]
        # The same memory in another version is another tensor: an in-place ReLU came in between.
        if all(run.source is not None and same_tensor(run.source, seen.tensor) for run in runs) and seen.version == min(
            run.version for run in runs
        ):
            features.append(replace(_what_the_heads_read(runs, recorded.aliased, shared), made_by=seen.made_by))
            continue
        if seen.edge is None:
            raise CaptureError(f"the feature {name!r} does not require grad, and no head can be trained.")
        edges = [seen.edge for _ in runs]
        features.append(FeatureMap(seen.tensor, edges, separate=False, direct=False, made_by=seen.made_by))
    if not feature_names:
        features.append(_what_the_heads_read(runs, recorded.aliased, shared))
    outputs, device = [run.output for run in runs], features[0].tensor.device
    weights = [run.weight for run in runs]
    return CapturedForward(ran, outputs, features, device, heads.modules, heads.columns, heads.groups, carried, weights)


def _have_graphs(runs: Sequence[HeadRun]) -> bool:
    for run in runs:
        if not isinstance(run.output, Tensor):
            raise CaptureError(
                f"head {run.name!r} returned {type(run.output).__name__}, expected a tensor. Say which part it is with "
                "output='logits' (a key or attribute), output=0 (an index) or a function, or choose the module whose "
                "output is the tensor."
            )
        if not run.output.is_floating_point():
            raise CaptureError(
                f"the output of head {run.name!r} is {run.output.dtype}, which has no gradient. Choose the module that "
                "returns the logits, or say which part they are with output=."
            )
        if run.output_version != version_of(run.output):
            raise CaptureError(
                f"the output of head {run.name!r} was changed in place after the head returned it (sigmoid_(), +=, ...). "
                "Use the operation that makes a new tensor."
            )
    without = [run.name for run in runs if not run.output.requires_grad]
    if without and len(without) < len(runs):
        raise CaptureError(
            f"the outputs of heads {without} carry no graph, those of the others do. Do not run single heads under no_grad."
        )
    return not without


def _what_the_heads_read(
    runs: Sequence[HeadRun], aliased: bool, shared: Callable[[Sequence[Tensor]], str]
) -> FeatureMap:
    if without := [run.name for run in runs if run.source is None]:
        raise CaptureError(
            f"head {without[0]!r} was called without a floating-point tensor. Name the feature map, e.g. "
            "feature='backbone', choose the module that reads it, or pass regularizer(outputs=..., features=...)."
        )
    sources = [run.source for run in runs if run.source is not None]
    if not all(same_tensor(source, sources[0]) for source in sources):
        shapes = {run.name: list(source.shape) for run, source in zip(runs, sources)}
        read = listed([f"{name} reads {shape}" for name, shape in shapes.items()], most=4)
        raise CaptureError(
            f"the heads do not read the same tensor: {read}. {shared(sources) or _NAME_IT}, or 'pool:input' for the input "
            "of a module."
        )
    # Heads that work in place write into the shared tensor: their aliases are not where they started.
    changed = any(run.changed_source for run in runs)
    separate = aliased and not (changed and runs[0].source_edge is not None)
    found = [run.edge if separate else run.source_edge for run in runs]
    edges = [edge for edge in found if edge is not None]
    return FeatureMap(sources[0], edges, separate=separate, direct=not changed and all(run.whole for run in runs))
