"""Under surgery: the aliases that heads are handed come out of one fork, where the gradients of all tasks meet again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...capture import (
    HeadAliases,
    HeadRun,
    Heads,
    Item,
    Path,
    as_edge,
    contents,
    is_plainly,
    put,
    put_argument,
    tensors_in,
)
from ...errors import CaptureError, ConfigurationError
from ...saliency import channel_axis_by_origin, resolve_channel_axis, task_columns
from ...torch_tools import Edge, edge_of, version_of, warn_user
from .columns import watch_columns
from .combiner import GradientCombiner
from .fork import Anchor, GradientFork


@dataclass
class Cut:
    """Where the penalty's graph is cut: its gradient there is taken at once, and let in again at the anchor."""

    edges: list[Edge]
    anchor: Tensor


@dataclass
class CarriedFork:
    """What a captured forward carries under surgery."""

    fork: GradientFork | None
    cuts: list[Cut]


class ForkedAliases(HeadAliases):
    """Hands each head an alias out of one fork per forward, of which the latest is kept.

    While the combiner is not enabled, heads get plain views. ``named`` says whether the user named feature maps.
    """

    def __init__(
        self,
        combiner: GradientCombiner,
        heads: Heads,
        output: Item | Mapping[str, Item | None] | None,
        *,
        named: bool,
        channel_axis: Any,
    ) -> None:
        super().__init__(heads)
        if heads.columns and callable(output):
            raise ConfigurationError(
                "under surgery the output of a head with a column per task is watched, which a function of what it returns "
                "does not allow. Pass a key, an attribute or an index as output=, or choose the module that returns them."
            )
        self._combiner = combiner
        self._named = named
        # Of the first feature map: by its shape the columns are found.
        self._channel_axis = next(iter(channel_axis), None) if isinstance(channel_axis, (list, tuple)) else channel_axis
        self._latest: _ForkedForward | None = None
        self._named_cuts: dict[int, Cut] = {}
        self._ran_with_gradients: set[int] = set()
        self._told_of_other_tensors = False

    @property
    def done(self) -> bool:
        return self._latest is not None and self._latest.fork.done

    def begin_forward(self, active: bool) -> None:
        super().begin_forward(active)
        self.forget()
        self._ran_with_gradients.clear()
        if active:
            self._combiner.forward_begins()

    def end_forward(self) -> CarriedFork:
        cuts = list(self._named_cuts.values())
        if self._latest is None:
            return CarriedFork(None, cuts)
        return CarriedFork(self._latest.fork, cuts + self._latest.cuts)

    def forget(self) -> None:
        super().forget()
        self._latest = None  # the graph still has it
        self._named_cuts = {}

    def of_feature(self, index: int, feature: Tensor, *, recorded: bool) -> Tensor | None:
        """Note where the penalty's gradient is taken and let in again; see :class:`HeadAliases`."""
        if recorded:
            self._named_cuts.pop(index, None)
        if recorded and self.for_penalty and self._combiner.enabled and feature.requires_grad:
            # A view may lose its node, what it is a view of does not.
            root = feature if feature._base is None else feature._base
            cut = _cut_at([root], Anchor.apply(root))
            if not any(as_edge(cut.edges[0]) == as_edge(known.edges[0]) for known in self._named_cuts.values()):
                self._named_cuts[index] = cut
        return super().of_feature(index, feature, recorded=recorded)

    def hand_out(
        self, head: int, args: tuple[Any, ...], kwargs: dict[str, Any], features: Sequence[Tensor], *, recorded: bool
    ) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Edge | None]:
        """Return the arguments of a head with aliases of all that the heads share; see :class:`HeadAliases`."""
        found = list(tensors_in(args, kwargs))
        paths = [(path, tensor) for path, tensor in found if tensor.requires_grad and not self.stands_in(tensor)]
        name = self.heads.names[head]
        if self._combiner.enabled and recorded:
            self._ran_with_gradients.add(head)
        elif self._combiner.enabled and head not in self._ran_with_gradients:
            raise CaptureError(
                f"head {name!r} runs for the first time in the backward pass, inside a reentrant checkpoint, where its "
                "gradient cannot be weighed against those of the others. Pass use_reentrant=False."
            )
        if not (paths and recorded and self._combiner.enabled):
            return super().hand_out(head, args, kwargs, features, recorded=recorded)
        source = next((tensor for path, tensor in found if len(path) == 1), None)
        read: list[Tensor] = []
        for feature in features:
            if any(is_plainly(tensor, feature) for _, tensor in paths) and not any(
                is_plainly(feature, known) for known in read
            ):
                read.append(feature)  # once, if it was named twice
        if not read:
            read = self._first_of(name, source, paths)
        if self._latest is None:
            self._latest = _ForkedForward(self._combiner, read, len(self.heads.modules))
        elif not self._latest.reads_the_same(read):
            raise CaptureError(
                f"under surgery all heads must read the same tensors: head {name!r} reads {_shapes(read)}, those before it "
                f"read {_shapes(self._latest.sources)}, or others of that shape. Name each head from where it begins to its "
                f"output, with what lies between (tower, dropout, pooling, gradient reversal): {self._as_branches(head)}. "
                "Or make that a part of the heads, or use ParameterSurgery. If the heads before it ran for something "
                "else, run them under no_grad."
            )
        elif self._latest.changed:
            raise CaptureError(
                "under surgery all heads must read the same tensors, and these were changed in place (mul_, +=, ...) before "
                f"head {name!r}. Use the operation that makes a new tensor, within the heads, or use ParameterSurgery."
            )
        edge: Edge | None = None
        for alias, shared in zip(self._latest.aliases[head], read):
            for path, tensor in paths:
                if is_plainly(tensor, shared):
                    args, kwargs = put_argument(args, kwargs, path, alias)
            if edge is None and source is not None and is_plainly(source, shared):
                edge = edge_of(alias)
        return (args, kwargs), edge

    def after_head(self, head: int, returned: Any, run: HeadRun, items: Sequence[Item], feature: Tensor | None) -> Any:
        """Return the output watched for its gradient; see :class:`HeadAliases`."""
        forked, name = self._latest, self.heads.names[head]
        if forked is None:
            return None
        if forked.changed and len(self.heads.modules) > 1:
            raise CaptureError(
                f"head {name!r} changes the feature map in place (ReLU(inplace=True), +=, ...), so that under surgery the "
                "other heads would read what its gradient does not tell. Use inplace=False."
            )
        source = forked.sources[0]
        if not self.heads.columns:
            # Only from one number per sample, at one map, can task gradients be told apart from the penalty's.
            whole = not items and isinstance(returned, Tensor) and returned.requires_grad
            if not (self.for_penalty and whole and returned.numel() == len(source) and len(forked.sources) == 1):
                return None
            return forked.fork.watch(head, returned)
        if not isinstance(run.output, Tensor) or not run.output.requires_grad:
            raise CaptureError(
                f"under surgery the output of head {name!r} must be a tensor with a column per task and a graph, found "
                f"{contents(returned)}. Say which part it is with output='logits' (a key or attribute) or output=0 (an "
                "index)."
            )
        read = source if feature is None else feature
        given = channel_axis_by_origin(read, None, None) if self._channel_axis is None else self._channel_axis
        axis = resolve_channel_axis(read.shape, given)
        columns = task_columns(run.output, len(self.heads.tasks), read.shape, axis, self.heads.groups)
        edges = [edge for cut in forked.cuts for edge in cut.edges]  # there is one head
        module = self.heads.modules[head] if run.whole else None
        watched = watch_columns(forked.fork, run.output, columns, edges, module)
        return put(returned, [item for item in items if not callable(item)], watched)

    def _as_branches(self, head: int) -> str:
        task, name = self.heads.tasks[head], self.heads.names[head]
        return f"heads={{{task!r}: [<first module>, {name!r}], ...}}"

    def _first_of(self, name: str, source: Tensor | None, paths: Sequence[tuple[Path, Tensor]]) -> list[Tensor]:
        """Return what a head shares with the others where no feature is named."""
        others = [tensor for _, tensor in paths if source is None or not is_plainly(tensor, source)]
        if source is None or not source.requires_grad or self.stands_in(source):
            raise CaptureError(
                f"under surgery it must be clear what the heads share: head {name!r} reads tensors that require grad, "
                f"{_shapes(others)}, but not as its first argument. Name the modules that they come from: "
                "feature='backbone', or feature=['layer3', 'layer4']."
            )
        if others and not self._named and not self._told_of_other_tensors:
            self._told_of_other_tensors = True
            warn_user(
                f"head {name!r} also reads a tensor {list(others[0].shape)} that requires grad; gradients through it are "
                "not weighed. If the heads share it, name all that they share: feature=['layer3', 'layer4']."
            )
        return [source]


class _ForkedForward:
    """The tensors that the heads of one forward share, their aliases, and where these are in the graph."""

    def __init__(self, combiner: GradientCombiner, sources: list[Tensor], heads: int) -> None:
        self.sources = sources
        self.versions = [version_of(source) for source in sources]
        self.fork = GradientFork(combiner, sources, heads)
        self.aliases, anchors = self.fork.hand_out(sources)
        self.cuts = [_cut_at(aliases, anchor) for aliases, anchor in zip(zip(*self.aliases), anchors)]

    @property
    def changed(self) -> bool:
        """Whether one was changed in place."""
        return self.versions != [version_of(source) for source in self.sources]

    def reads_the_same(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self.sources) and all(map(is_plainly, tensors, self.sources))


def _cut_at(aliases: Sequence[Tensor], anchor: Tensor) -> Cut:
    return Cut([edge for alias in aliases if (edge := edge_of(alias)) is not None], anchor)


def _shapes(tensors: Sequence[Tensor]) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors]
