"""One forward: as the hooks record it, and as it is captured, checked and ready to be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, NoHeadRanError
from ..torch_tools import Edge, Gradient, same_tensor, version_of
from .graph_names import NAME_IT, Names, Trace
from .heads import ColumnGroups, Heads, of_methods
from .linear import Weight
from .lookup import listed
from .nested import part_of_each, tensors_in
from .other_heads import HeadCall
from .places import Place, as_edge, is_plainly, is_turned, read_elsewhere


@dataclass
class HeadRun:
    """One head's part in a forward."""

    name: str
    place: Place | None  # of the tensor that the head was called with, before any head ran on it
    version: int  # of that tensor, before this head ran
    version_after: int = -1
    given: tuple[Any, Any] = ((), {})  # the arguments, where none of them is a tensor
    unusable: str = ""  # why what the head was called with is no feature map
    edge: Edge | None = None  # of the alias that the head read
    output: Any = None
    output_version: int = -1
    kept: Tensor | None = None  # a copy of the output, for a model that changes it in place later
    whole: bool = True  # the output is all that the head returned, and the head is one module
    weight: Weight = None  # of a plain Linear, when it ran
    ended: bool = False  # a head of several modules may begin, and not end
    goes_on: bool = False  # another module is reading its output
    differentiable: int = 0  # tensors among its arguments
    call: HeadCall | None = None  # how it was called, where somebody looks on

    @property
    def source(self) -> Tensor | None:
        return None if self.place is None else self.place.tensor

    @property
    def changed_source(self) -> bool:
        return self.version_after != self.version

    @property
    def output_changed(self) -> bool:
        """Whether the output was changed in place since the head returned it."""
        return isinstance(self.output, Tensor) and version_of(self.output) != self.output_version


@dataclass
class RecordedForward:
    """What the hooks saw in one forward."""

    active: bool
    runs: dict[int, HeadRun] = field(default_factory=dict)
    features: dict[int, Place] = field(default_factory=dict)
    without_grad: set[int] = field(default_factory=set)  # named feature maps that ran under no_grad
    aliased: bool = False  # heads were handed aliases
    complete: bool = False  # the model's own forward has ended with heads in it
    # How a head was called (args, kwargs, autocast), to call the others like it.
    call: tuple[Any, Any, AbstractContextManager[Any]] | None = None
    # Heads in the unread forward that this one replaced, because a head was called outside the model.
    displaced: int = 0
    # Heads that read another tensor before this forward began with one, where parts are called one by one.
    other_runs: dict[int, HeadRun] = field(default_factory=dict)
    training: bool = True  # the mode of the first head
    over: bool = False  # the optimizer took a step since
    problem: str | None = None
    trace: Trace | None = None
    returned: Any = None  # by the model, where it is to be looked at
    carried: Any = None  # what the aliases leave with it
    looked_at: bool = False  # by who does not take it

    @property
    def ended(self) -> dict[int, HeadRun]:
        """The heads that have an output, in the order in which they began."""
        return {index: run for index, run in self.runs.items() if run.ended}

    def run_of(self, name: str, source: Tensor | None) -> HeadRun:
        """Begin a head's run; heads that read one tensor share its place before any of them ran."""
        if source is None:
            return HeadRun(name, None, -1)
        known = next((run.place for run in reversed(self.runs.values()) if run.source is source), None)
        return HeadRun(name, known or Place.of(source), version_of(source))

    def may_hold(self, source: Tensor) -> bool:
        """Whether a head that reads this may belong to the forward in which the others have run."""
        runs = self.runs.values()
        first, latest = (
            next((run.source for run in way if run.source is not None), None) for way in (runs, reversed(runs))
        )
        if first is None or latest is None:
            return True
        return same_tensor(source, latest) or same_tensor(source, first) or _have_equal_values([source, first])


@dataclass
class FeatureMap:
    """One feature map, and where its gradients are taken."""

    tensor: Tensor
    edges: Sequence[Edge]  # one per head that ran
    separate: bool  # whether each head has an alias of its own
    direct: bool  # whether the heads read the feature map itself
    # What picks its gradient out of that at the edges, where these are of a larger tensor.
    entries: Callable[[Tensor], Tensor] | None = None
    made_by: nn.Module | None = None  # the module that returned it, where that is known
    batch_axis: int = 0
    turned: Sequence[str] = ()  # heads that read it through something that changes gradients and no values

    def gradient(self, at_edge: Gradient) -> Gradient:
        """Return the gradient of the feature map, of that at one of the edges."""
        return at_edge if at_edge is None or self.entries is None else self.entries(at_edge)


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
    shared: Callable[[Sequence[Tensor]], str] = lambda _: ""  # says which modules they depend on, for errors
    calls: Sequence[HeadCall | None] = ()  # how the heads that ran were called, where somebody looks on
    no_heads: NoHeadRanError | None = None  # why there is nothing in it; only where other processes may have more

    @property
    def batch_size(self) -> int:
        """Samples in the first feature map; 0 in a forward without heads."""
        return self.features[0].tensor.shape[self.features[0].batch_axis] if self.features else 0

    @property
    def heads_alone(self) -> bool:
        """Whether there is nothing but the heads between the feature maps and the outputs."""
        return bool(self.modules) and all(feature.direct for feature in self.features)

    def row_of(self, task: int) -> int:
        """Return where the head of a task is among those that ran."""
        return 0 if self.columns else self.ran.index(task)

    def tasks(self, num_tasks: int) -> Sequence[int]:
        """Return the tasks that can have a saliency: all columns of a single head, or the heads that ran."""
        return range(num_tasks) if self.columns and self.ran else self.ran


def checked_forward(
    recorded: RecordedForward,
    heads: Heads,
    feature_names: Sequence[str],
    ways: Sequence[Ways],
    names: Names,
) -> CapturedForward | None:
    """Return what was recorded if it can be used, ``None`` if the outputs carry no graph; else raise a CaptureError.

    ``ways`` is what is known of each named feature map; ``names`` are those of tensors and modules, for errors.
    """
    if recorded.problem is not None:
        raise CaptureError(recorded.problem)
    ran = sorted(recorded.ended)
    runs = [recorded.runs[index] for index in ran]
    if not runs:
        raise NoHeadRanError(
            f"no head ran in the latest forward; the heads are {list(heads.names)}. Choose heads that the model's forward "
            "calls as modules, head(feature), not inside a reentrant checkpoint (pass use_reentrant=False), or pass "
            f"regularizer(outputs=..., features=...).{of_methods(heads, names.inside)}"
        )
    if len(runs) < recorded.displaced:
        raise CaptureError(
            f"heads {[run.name for run in runs]} ran again on their own after the model's forward, which had "
            "not been read. Call regularizer() right after the model, before heads are called on their own."
        )
    if set(recorded.other_runs) - set(recorded.runs):
        raise CaptureError(_other_tensors([*recorded.other_runs.values(), *runs], names))
    if not _have_graphs(runs, [heads.tasks[index] for index in ran]):
        return None
    if missing := [index for index in range(len(feature_names)) if index not in recorded.features]:
        name = feature_names[missing[0]]
        if missing[0] in recorded.without_grad:
            raise CaptureError(
                f"the feature {name!r} ran under no_grad, so that no gradient leads there. Leave feature= out: then it is "
                "what the heads are called with. Or run it with gradients, and freeze it by requires_grad_(False); inside a "
                "checkpoint, use_reentrant=False is needed."
            )
        raise CaptureError(
            f"the feature {name!r} did not run with gradients in the latest forward. Choose a module that the "
            "forward calls as a module; inside a checkpoint, use_reentrant=False is needed."
        )
    outputs = [_output_as_returned(run) for run in runs]
    features = []
    for index, name in enumerate(feature_names):
        seen = recorded.features[index]
        if _heads_read(seen, recorded) and not ways[index].others_read(seen, recorded, outputs):
            features.append(replace(_what_the_heads_read(recorded, names), made_by=seen.made_by))
            continue
        edge, entries = seen.differentiable()
        if edge is None:
            raise CaptureError(f"the feature {name!r} does not require grad, and no head can be trained.")
        edges = [edge for _ in runs]
        features.append(FeatureMap(seen.tensor, edges, False, False, entries, seen.made_by))
    if not feature_names:
        features.append(_what_the_heads_read(recorded, names))
    device, weights = features[0].tensor.device, [run.weight for run in runs]
    of_heads = heads.modules, heads.columns, heads.groups
    found = CapturedForward(ran, outputs, features, device, *of_heads, recorded.carried, weights, names.shared_by)
    return replace(found, calls=[run.call for run in runs])


class Ways:
    """Whether outputs depend on a named feature map on other ways than through what the heads are called with.

    Looked at once for each head, and again when it is called with other arguments.
    """

    def __init__(self) -> None:
        self.others = False
        self._known: set[tuple[int, int]] = set()

    def others_read(self, seen: Place, recorded: RecordedForward, outputs: Sequence[Tensor]) -> bool:
        """Tell whether any output reads the map past its head, in this forward or an earlier one."""
        edge, heads = seen.edge, {(index, run.differentiable) for index, run in recorded.ended.items()}
        if not self.others and edge is not None and not heads <= self._known and recorded.aliased:
            # Ways that lead through another named feature map are those of that one.
            others = [place.edge for place in recorded.features.values() if place is not seen]
            named = [other for other in others if other is not None and as_edge(other) != as_edge(edge)]
            self.others = read_elsewhere(edge, [*(run.edge for run in recorded.ended.values()), *named], outputs)
            self._known |= heads
        return self.others


def _heads_read(seen: Place, recorded: RecordedForward) -> bool:
    """Whether the heads are called with this tensor, in the version that it had."""
    runs = recorded.ended.values()
    return (
        all(run.source is not None and is_plainly(run.source, seen.tensor) for run in runs)
        and seen.version == min(run.version for run in runs)
        and _changed_between(recorded) is None
    )


def _changed_between(recorded: RecordedForward) -> tuple[HeadRun, HeadRun] | None:
    """Return two heads between which the model changed in place what they read."""
    runs = list(recorded.ended.values())  # in the order in which they ran
    pairs = (pair for pair in pairwise(runs) if pair[0].version_after != pair[1].version)
    return next((pair for pair in pairs if _same_memory(pair)), None)


def _same_memory(runs: Sequence[HeadRun]) -> bool:
    sources = [run.source for run in runs if run.source is not None]
    return len(sources) == len(runs) and all(same_tensor(source, sources[0]) for source in sources)


def _output_as_returned(run: HeadRun) -> Tensor:
    if not run.output_changed:
        return run.output  # type: ignore[no-any-return]
    if run.kept is None:
        raise CaptureError(
            f"the output of head {run.name!r} was changed in place after the head returned it (sigmoid_(), +=, ...), "
            "which it was not in the first forward. Use the operation that makes a new tensor, or pass "
            "output=lambda out: out.clone()."
        )
    return run.kept


def _have_graphs(runs: Sequence[HeadRun], tasks: Sequence[str]) -> bool:
    for run in runs:
        if not isinstance(run.output, Tensor):
            part = part_of_each(dict(zip(tasks, [run.output for run in runs])))
            raise CaptureError(
                f"head {run.name!r} returned {type(run.output).__name__}, expected a tensor. Say which part it is, e.g. "
                f"{part} (a key, an attribute, an index or a function), or choose the module whose output is the tensor."
            )
        if not run.output.is_floating_point():
            raise CaptureError(
                f"the output of head {run.name!r} is {run.output.dtype}, which has no gradient. Choose the module that "
                "returns the logits, or say which part they are with output=."
            )
    without = [run.name for run in runs if not run.output.requires_grad]
    if without and len(without) < len(runs):
        raise CaptureError(
            f"the outputs of heads {without} carry no graph, those of the others do. Do not run single heads under no_grad."
        )
    return not without


def _what_the_heads_read(recorded: RecordedForward, names: Names) -> FeatureMap:
    ended = recorded.ended
    runs = [ended[index] for index in sorted(ended)]
    if without := [run for run in runs if run.source is None]:
        if without[0].unusable:
            raise CaptureError(f"what head {without[0].name!r} is called with {without[0].unusable}.")
        given = {run.name: dict(tensors_in(*run.given)) if run.source is None else {(): run.source} for run in runs}
        outputs = {run.name: run.output for run in runs}
        raise CaptureError(names.instead_of_a_tensor(without[0].name, given, outputs))
    sources = [run.source for run in runs if run.source is not None]
    changed = any(run.changed_source for run in runs)
    together = _same_memory(runs)
    if not together and (changed or not _have_equal_values(sources)):
        raise CaptureError(_other_tensors(runs, names))
    if between := _changed_between(recorded):
        raise CaptureError(
            f"the heads do not read the same tensor: it was changed in place (mul_, +=, ...) after head {between[0].name!r} "
            f"and before {between[1].name!r}. Name the module whose output they share, e.g. feature='backbone', whose "
            "gradient is then taken through these changes, or make them a part of the heads."
        )
    # Heads that work in place write into the shared tensor: their aliases are not where they started.
    entries, first = None, next(iter(ended.values())).place
    if changed and first is not None and first.edge is not None:
        edge, entries = first.differentiable()
        found: list[Edge | None] = [edge] * len(runs)
        separate = False
    else:
        separate = recorded.aliased
        found = [run.edge if separate or run.place is None else run.place.edge for run in runs]
    edges = [edge for edge in found if edge is not None]
    direct = not changed and all(run.whole for run in runs)
    kept = together and all(version_of(source) == run.version for run, source in zip(runs, sources))
    turned = [run.name for run, source in zip(runs, sources) if kept and is_turned(source, sources[0])]
    return FeatureMap(sources[0], edges, separate=separate, direct=direct, entries=entries, turned=turned)


def _have_equal_values(tensors: Sequence[Tensor]) -> bool:
    """Whether they hold the same values: each head has a copy, or the backbone ran again for each."""
    first = tensors[0]
    return all(
        (one.shape, one.dtype, one.device) == (first.shape, first.dtype, first.device) and torch.equal(one, first)
        for one in tensors
    )


def _other_tensors(runs: Sequence[HeadRun], names: Names) -> str:
    sources = {run.name: run.source for run in runs}
    shapes = [f"{name} reads {None if source is None else list(source.shape)}" for name, source in sources.items()]
    common = names.shared_by([source for source in sources.values() if source is not None])
    return f"the heads do not read the same tensor: {listed(shapes, most=4)}. {common or NAME_IT}."
