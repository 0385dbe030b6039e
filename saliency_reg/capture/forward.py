"""One forward: as the hooks record it, and as it is captured, checked and ready to be differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, NoHeadRanError
from ..torch_tools import Edge, same_tensor, version_of
from .heads import Heads


@dataclass
class HeadRun:
    """One head's part in a forward."""

    source: Tensor | None  # the tensor that the head was called with
    source_edge: Edge | None  # where that was in the graph before any head ran on it
    version: int  # of the source, before this head ran
    edge: Edge | None = None  # of the alias that the head read
    output: Any = None
    output_version: int = -1
    changed_source: bool = False
    whole: bool = True  # the output is all that the head returned


@dataclass
class HeadCall:
    """How a head was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: tuple[str, torch.dtype, bool] | None  # kind of device, number format, whether it was on

    @classmethod
    def of(cls, args: Any, kwargs: Any, source: Tensor) -> HeadCall:
        """The call with these arguments, in the autocast that is on now for the device of ``source``."""
        kind = source.device.type
        autocast = None
        if torch.amp.is_autocast_available(kind):
            autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        return cls(tuple(args), dict(kwargs), autocast)


@dataclass
class SeenFeature:
    """A named feature map."""

    tensor: Tensor
    edge: Edge | None
    version: int


@dataclass
class RecordedForward:
    """What the hooks saw in one forward."""

    active: bool
    runs: dict[int, HeadRun] = field(default_factory=dict)
    features: dict[int, SeenFeature] = field(default_factory=dict)
    aliased: bool = False  # heads were handed aliases
    complete: bool = False  # the model's own forward has ended with heads in it
    call: HeadCall | None = None  # how a head was called, to call the others like it
    displaced: int = 0  # number of heads in the unread forward that heads called one by one put an end to
    problem: str | None = None


@dataclass
class FeatureMap:
    """One feature map, and where its gradients are taken."""

    tensor: Tensor
    edges: list[list[Edge]]  # one list per head that ran: the gradients there add up to its saliency
    separate: bool  # whether each head has an alias of its own
    direct: bool  # whether the heads read the feature map itself


@dataclass
class CapturedForward:
    """One forward, ready to be differentiated.

    Attributes:
        ran: indices of the heads that ran.
        outputs: one for each of them.
        features: the feature maps, at least one unless no head ran.
        device: of the feature maps, or else of the heads.
        modules: the head modules; a single one if ``columns``, none where outputs were passed by hand.
        columns: whether a single module has a column for each task.
        carried: what the aliases left with this forward; only those who made them know.
        no_heads: why there is nothing in it; only where other processes may have more.
    """

    ran: list[int]
    outputs: list[Tensor]
    features: list[FeatureMap]
    device: torch.device
    modules: Sequence[nn.Module] = ()
    columns: bool = False
    carried: Any = None
    no_heads: NoHeadRanError | None = None

    @property
    def batch_size(self) -> int:
        """Samples in the first feature map; 0 in a forward without heads."""
        return len(self.features[0].tensor) if self.features else 0

    def tasks(self, num_tasks: int) -> Sequence[int]:
        """The tasks that can have a saliency: all columns of a single head, or the heads that ran."""
        return range(num_tasks) if self.columns and self.ran else self.ran


def check_forward(
    recorded: RecordedForward, heads: Heads, feature_names: Sequence[str]
) -> tuple[list[int], list[Tensor], list[FeatureMap]] | None:
    """The heads that ran, their outputs, and the feature maps; ``None`` if the outputs carry no graph.

    Raises:
        NoHeadRanError: no head ran in it.
        CaptureError: the forward cannot be used; the message says why.
    """
    if recorded.problem is not None:
        raise CaptureError(recorded.problem)
    names = heads.names
    ran = sorted(recorded.runs)
    if not ran:
        raise NoHeadRanError(
            f"no head ran in the latest forward; the heads are {list(names)}. Choose heads that the model's forward "
            "calls as modules, head(feature), not inside a reentrant checkpoint (pass use_reentrant=False), or pass "
            "regularizer(outputs=..., features=...)."
        )
    if len(ran) < recorded.displaced:
        raise CaptureError(
            f"heads {[names[index] for index in ran]} ran again on their own after the model's forward, which had "
            "not been read. Call regularizer() right after the model, before heads are called on their own."
        )
    runs = [recorded.runs[index] for index in ran]
    names = tuple(names[index] for index in ran)
    if not _have_graphs(runs, names):
        return None
    outputs = [run.output for run in runs]
    if not feature_names:
        return ran, outputs, [_what_the_heads_read(recorded, runs, names)]
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
            features.append(_what_the_heads_read(recorded, runs, names))
            continue
        if seen.edge is None:
            raise CaptureError(f"the feature {name!r} does not require grad, and no head can be trained.")
        features.append(FeatureMap(seen.tensor, [[seen.edge] for _ in runs], separate=False, direct=False))
    return ran, outputs, features


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


def _what_the_heads_read(recorded: RecordedForward, runs: Sequence[HeadRun], names: Sequence[str]) -> FeatureMap:
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
    separate = recorded.aliased and not (changed and runs[0].source_edge is not None)
    found = [run.edge if separate else run.source_edge for run in runs]
    edges = [[edge] for edge in found if edge is not None]
    direct = not changed and all(run.whole for run in runs)
    return FeatureMap(sources[0], edges, separate=separate, direct=direct)


def _shortened(shapes: dict[str, list[int]], most: int = 4) -> str:
    shown = ", ".join(f"{name} reads {shape}" for name, shape in list(shapes.items())[:most])
    return shown + (f" and {len(shapes) - most} more" if len(shapes) > most else "")
