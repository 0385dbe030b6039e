"""Under surgery: the aliases that heads are handed come out of one fork, where the gradients of all tasks meet again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...capture import HeadAliases, HeadRun, Heads, Item, Path, contents, is_plain_linear, put, put_argument, tensors_in
from ...errors import CaptureError, ConfigurationError
from ...saliency import axis_of_columns, resolve_channel_axis
from ...torch_tools import Edge, edge_of, same_tensor, version_of, warn_user
from .columns import tap_columns
from .combiner import GradientCombiner
from .fork import Anchor, GradientFork, fork


@dataclass
class Cut:
    """Where the penalty's graph is cut: its gradient there is taken at once, and let in again at the anchor."""

    edges: list[Edge]
    anchor: Tensor


@dataclass
class CarriedFork:
    """What a captured forward carries under surgery."""

    fork: GradientFork | None = None
    cuts: list[Cut] = field(default_factory=list)


class ForkedAliases(HeadAliases):
    """Hands each head an alias out of one fork per forward, of which the latest is kept.

    Args:
        combiner: weighs the gradients. While it is not enabled, heads get plain views.
        heads: the model's heads.
        output: which part of what a head returns is the task's output.
        named: whether the user named feature maps.
        channel_axis: of the feature map, to find the columns of a head that has one per task.

    Raises:
        ConfigurationError: a function as ``output``, for a head with a column per task.
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
        # One for each of several maps says nothing of what a head reads.
        self._channel_axis = channel_axis if isinstance(channel_axis, int) else None
        self._latest: _ForkedForward | None = None
        self._named_cuts: dict[int, Cut] = {}
        self._ran_with_gradients: set[int] = set()
        self._told_of_other_tensors = False

    @property
    def done(self) -> bool:
        """Whether a backward pass has been through the latest fork."""
        return self._latest is not None and self._latest.fork.done

    def begin_forward(self, active: bool) -> None:
        """Forget the fork before; all processes are here."""
        self.forget()
        self._ran_with_gradients.clear()
        if active:
            self._combiner.forward_begins()

    def end_forward(self) -> CarriedFork:
        """Return the fork, and where it cuts the graph of a penalty."""
        carried = CarriedFork(cuts=list(self._named_cuts.values()))
        if self._latest is not None:
            carried.fork = self._latest.fork
            carried.cuts += self._latest.cuts()
        return carried

    def forget(self) -> None:
        """Let go of the latest fork; the graph still has it."""
        self._latest = None
        self._named_cuts = {}

    def of_feature(self, index: int, feature: Tensor, *, recorded: bool) -> Tensor | None:
        """Return a tensor that has, beside it, an anchor for the penalty's gradient."""
        replaced = super().of_feature(index, feature, recorded=recorded)
        if not recorded:
            return replaced
        self._named_cuts.pop(index, None)
        if replaced is None and self.for_penalty and self._combiner.enabled and feature.requires_grad:
            replaced, anchor = Anchor.apply(self._combiner, feature)
            if (edge := edge_of(replaced)) is not None:
                self._named_cuts[index] = Cut([edge], anchor)
        return replaced

    def hand_out(
        self, head: int, args: tuple[Any, ...], kwargs: dict[str, Any], features: Sequence[Tensor], *, recorded: bool
    ) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Edge | None]:
        """Return the arguments of a head with aliases of all that the heads share; see :class:`HeadAliases`.

        Raises:
            CaptureError: it is not clear what the heads share, or they do not share it, or the head runs in a recomputation
                only.
        """
        found = list(tensors_in(args, kwargs))
        paths = [(path, tensor) for path, tensor in found if tensor.requires_grad]
        if self._combiner.enabled and recorded:
            self._ran_with_gradients.add(head)
        elif self._combiner.enabled:
            self._check_recomputation(head)
        if not (paths and recorded and self._combiner.enabled):
            return super().hand_out(head, args, kwargs, features, recorded=recorded)
        source = next((tensor for path, tensor in found if len(path) == 1), None)
        read = [feature for feature in features if any(_is_plainly(tensor, feature) for _, tensor in paths)]
        if not read:
            read = self._first_of(head, source, paths)
        if self._latest is None:
            self._latest = _ForkedForward(self._combiner, read, len(self.heads.modules))
        elif not self._latest.reads_the_same(read):
            raise CaptureError(
                f"under surgery all heads must read the same tensors: head {self.heads.names[head]!r} reads "
                f"{[list(tensor.shape) for tensor in read]}, those before it read "
                f"{[list(tensor.shape) for tensor in self._latest.sources]}, or others of that shape. Make what lies "
                "between (dropout, pooling, gradient reversal) a part of the heads, or use ParameterSurgery. If the heads "
                "before it ran for something else, run them under no_grad."
            )
        edge: Edge | None = None
        for alias, shared in zip(self._latest.aliases[head], read):
            for path, tensor in paths:
                if _is_plainly(tensor, shared):
                    args, kwargs = put_argument(args, kwargs, path, alias)
            if edge is None and source is not None and _is_plainly(source, shared):
                edge = edge_of(alias)
        return (args, kwargs), edge

    def after_head(self, head: int, returned: Any, run: HeadRun, items: Sequence[Item], feature: Tensor | None) -> Any:
        """Return the output watched for its gradient; see :class:`HeadAliases`.

        Raises:
            CaptureError: the head changed what the others read, or its columns cannot be watched.
        """
        made, name = self._latest, self.heads.names[head]
        if made is None:
            return None
        if made.changed_in_place:
            raise CaptureError(
                f"head {name!r} changes the feature map in place (ReLU(inplace=True), +=, ...), so that under surgery the "
                "other heads would read what its gradient does not tell. Use inplace=False."
            )
        if not self.heads.columns:
            if not self.for_penalty or items or not isinstance(returned, Tensor) or not returned.requires_grad:
                return None
            return made.watch(returned, head)
        if not isinstance(run.output, Tensor) or not run.output.requires_grad:
            raise CaptureError(
                f"under surgery the output of head {name!r} must be a tensor with a column per task and a graph, found "
                f"{contents(returned)}. Say which part it is with output='logits' (a key or attribute) or output=0 (an "
                "index)."
            )
        shape = (made.sources[0] if feature is None else feature).shape
        axis = axis_of_columns(
            run.output, len(self.heads.tasks), shape, resolve_channel_axis(shape, self._channel_axis)
        )
        tapped = made.tap(run.output, axis, self.heads.modules[head] if run.whole else None)
        return put(returned, [item for item in items if not callable(item)], tapped)

    def _check_recomputation(self, head: int) -> None:
        if head not in self._ran_with_gradients:
            raise CaptureError(
                f"head {self.heads.names[head]!r} runs for the first time in the backward pass, inside a reentrant "
                "checkpoint, where its gradient cannot be weighed against those of the others. Pass use_reentrant=False."
            )

    def _first_of(self, head: int, source: Tensor | None, paths: Sequence[tuple[Path, Tensor]]) -> list[Tensor]:
        """What a head shares with the others where no feature is named."""
        others = [tensor for _, tensor in paths if source is None or not _is_plainly(tensor, source)]
        if source is None or not source.requires_grad:
            raise CaptureError(
                f"under surgery it must be clear what the heads share: head {self.heads.names[head]!r} reads tensors that "
                f"require grad, {[list(tensor.shape) for tensor in others]}, but not as its first argument. Name the "
                "modules that they come from: feature='backbone', or feature=['layer3', 'layer4']."
            )
        if others and not self._named and not self._told_of_other_tensors:
            self._told_of_other_tensors = True
            warn_user(
                f"head {self.heads.names[head]!r} also reads a tensor {list(others[0].shape)} that requires grad; "
                "gradients through it are not weighed. If the heads share it, name all that they share: feature=['layer3', "
                "'layer4']."
            )
        return [source]


class _ForkedForward:
    """The aliases of one forward, and where they are in the graph."""

    def __init__(self, combiner: GradientCombiner, sources: Sequence[Tensor], heads: int) -> None:
        self.sources = list(sources)
        self._versions = [version_of(source) for source in sources]
        self.aliases, self._anchors, self.fork = fork(combiner, sources, heads)
        self._edges = [[edge for alias in own if (edge := edge_of(alias)) is not None] for own in self.aliases]

    def reads_the_same(self, tensors: Sequence[Tensor]) -> bool:
        return len(tensors) == len(self.sources) and all(map(_is_plainly, tensors, self.sources))

    @property
    def changed_in_place(self) -> bool:
        return self._versions != [version_of(source) for source in self.sources]

    def cuts(self) -> list[Cut]:
        """For each tensor: where heads read it, and where a gradient gets in that bypasses the surgery."""
        return [Cut([own[source] for own in self._edges], anchor) for source, anchor in enumerate(self._anchors)]

    def watch(self, output: Tensor, task: int) -> Tensor:
        """The output of a head with one number per sample, watched for its gradient; any other as it is."""
        if output.numel() != len(self.sources[0]) or len(self.sources) > 1:
            return output
        return self.fork.watch(task, output)

    def tap(self, output: Tensor, axis: int, head: nn.Module | None) -> Tensor:
        """The output of a head with a column per task, watched for the gradient of each column."""
        plain = head is not None and axis == output.ndim - 1 and is_plain_linear(head) and len(self.sources) == 1
        linear = head if plain and isinstance(head, nn.Linear) else None
        return tap_columns(self.fork, output, axis, self._edges[0], linear)


def _is_plainly(tensor: Tensor, other: Tensor) -> bool:
    """Whether one can stand for the other: the same entries, without anything in between that changes a gradient.

    A view of the same memory is not enough: gradient reversal is ``x.view_as(x)`` with a backward of its own.
    """
    if tensor is other:
        return True
    return (
        same_tensor(tensor, other)
        and not tensor._backward_hooks
        and not other._backward_hooks
        and _behind_views(tensor) is not None
        and _behind_views(tensor) == _behind_views(other)
    )


def _behind_views(tensor: Tensor) -> tuple[Any, int] | None:
    """Node and output that a tensor is a plain view of; ``None`` for one without a graph."""
    if tensor.grad_fn is None:
        return (id(tensor), 0) if tensor.requires_grad else None
    node, output = tensor.grad_fn, tensor.output_nr
    while node.name() in _PLAIN_VIEWS and node.next_functions[0][0] is not None:
        node, output = node.next_functions[0]  # type: ignore[assignment]
    variable = getattr(node, "variable", None)
    return (node, output) if variable is None else (id(variable), 0)


#: Of one argument, and with a gradient that is a view too.
_PLAIN_VIEWS = {
    "AliasBackward0",
    "PermuteBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "TBackward0",
    "TransposeBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
