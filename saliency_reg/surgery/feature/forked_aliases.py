"""Under surgery: what each head is handed in place of what all heads read, and what becomes of its output."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...capture.forward import Cut, HeadRun, place_in_graph, version_of
from ...capture.heads import Heads
from ...capture.nested import Item, contents, put, put_argument
from ...errors import CaptureError
from .combiner import ForkSurgery
from .fork import Fork
from .forked import ForkedForward, is_plainly, tensor_places

__all__ = ["Forking"]


class Forking:
    """The forks of one model's forwards, of which the latest is kept.

    Args:
        surgery: weighs the gradients.
        heads: the model's heads.
        named: whether the user named feature maps.
        channel_axis: of the feature map, to find the columns of a head that has one per task.
    """

    def __init__(self, surgery: ForkSurgery, heads: Heads, named: bool, channel_axis: Any) -> None:
        self.surgery = surgery
        self._heads = heads
        self._named = named
        # One for each of several maps says nothing of what a head reads.
        self._channel_axis = channel_axis if isinstance(channel_axis, int) else None
        self._latest: ForkedForward | None = None
        self._ran_with_gradients: set[int] = set()
        self._told_of_other_tensors = False

    @property
    def operates(self) -> bool:
        """Whether heads are handed forks now."""
        return self.surgery.enabled

    @property
    def fork(self) -> Fork | None:
        """The fork of the latest forward, if there is one."""
        return None if self._latest is None else self._latest.fork

    @property
    def cuts(self) -> list[Cut]:
        """Where that fork cuts the graph of a penalty."""
        return [] if self._latest is None else self._latest.cuts()

    @property
    def done(self) -> bool:
        """Whether a backward pass has been through the latest fork."""
        return self._latest is not None and self._latest.done

    def begin(self, active: bool) -> None:
        """A forward begins, with gradients if it is ``active``."""
        self._latest = None
        self._ran_with_gradients.clear()
        if active:
            self.surgery.forward_begins()

    def forget(self) -> None:
        """The latest forward is over, or was none."""
        self._latest = None

    def runs(self, index: int) -> None:
        """A head runs with gradients, in a forward."""
        self._ran_with_gradients.add(index)

    def check_recomputation(self, index: int) -> None:
        """A head runs within a backward pass.

        Raises:
            CaptureError: it did not run with gradients before.
        """
        if index not in self._ran_with_gradients:
            raise CaptureError(
                f"head {self._heads.names[index]!r} runs for the first time in the backward pass, inside a reentrant "
                "checkpoint, where its gradient cannot be weighed against those of the others. Type use_reentrant=False."
            )

    def hand_out(
        self,
        index: int,
        source: Tensor | None,
        features: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[HeadRun, tuple[Any, ...], dict[str, Any]]:
        """The arguments of a head with its aliases of what all heads read, and what is known of its run.

        Args:
            index: of the head.
            source: its first tensor.
            features: the named feature maps of this forward; those among the arguments are shared, or else ``source``.
            args, kwargs: what it was called with.

        Raises:
            CaptureError: it is not clear what the heads share, or they do not share it.
        """
        places = [(way, tensor) for way, tensor in tensor_places(args, kwargs) if tensor.requires_grad]
        read = [feature for feature in features if any(is_plainly(tensor, feature) for _, tensor in places)]
        if not read:
            read = self._first_of(index, source, places)
        if self._latest is None:
            self._latest = ForkedForward(self.surgery, read, len(self._heads.modules))
        elif not self._latest.reads_the_same(read):
            raise CaptureError(
                f"under surgery all heads must read the same tensors: head {self._heads.names[index]!r} reads "
                f"{[list(tensor.shape) for tensor in read]}, those before it read "
                f"{[list(tensor.shape) for tensor in self._latest.sources]}, or others of that shape. Make what lies "
                "between (dropout, pooling, gradient reversal) a part of the heads, or use ParameterSurgery. If the heads "
                "before it ran for something else, run them under no_grad."
            )
        run = HeadRun(source, None, None, -1)
        if source is not None:
            run.source_edge, run.version = place_in_graph(source), version_of(source)
        for alias, shared in zip(self._latest.aliases(index), read):
            for way, tensor in places:
                if is_plainly(tensor, shared):
                    args, kwargs = put_argument(args, kwargs, way, alias)
            if run.edge is None and source is not None and is_plainly(source, shared):
                run.edge = place_in_graph(alias)
        return run, args, kwargs

    def after_head(
        self, index: int, output: Any, run: HeadRun, items: Sequence[Item], feature: Tensor | None, penalty: bool
    ) -> Any:
        """What takes the place of the head's output; ``None`` for nothing.

        Args:
            index: of the head.
            output: all that it returned.
            run: with its task's output.
            items: which part of ``output`` that is.
            feature: the first named feature map.
            penalty: whether a penalty comes back through the heads too.

        Raises:
            CaptureError: it changed what the others read, or its columns cannot be watched.
        """
        made, name = self._latest, self._heads.names[index]
        if made is None:
            return None
        if made.changed_in_place:
            raise CaptureError(
                f"head {name!r} changes the feature map in place (ReLU(inplace=True), +=, ...), so that under surgery the "
                "other heads would read what its gradient does not tell. Type inplace=False."
            )
        if not self._heads.columns:
            if not penalty or items or not isinstance(output, Tensor) or not output.requires_grad:
                return None
            return made.watch(output, index)
        if not isinstance(run.output, Tensor) or not run.output.requires_grad:
            raise CaptureError(
                f"under surgery the output of head {name!r} must be a tensor with a column per task and a graph, found "
                f"{contents(output)}. Say which part it is with output='logits' (a key or attribute) or output=0 (an index)."
            )
        shape = (made.sources[0] if feature is None else feature).shape
        module, tasks = self._heads.modules[index], len(self._heads.tasks)
        tapped = made.tap(run.output, module, tasks, run.whole, shape, self._channel_axis)
        return put(output, [item for item in items if not callable(item)], tapped)

    def _first_of(self, index: int, source: Tensor | None, places: Sequence[tuple[Any, Tensor]]) -> list[Tensor]:
        """What a head shares with the others where no feature is named."""
        others = [tensor for _, tensor in places if source is None or not is_plainly(tensor, source)]
        if source is None or not source.requires_grad:
            raise CaptureError(
                f"under surgery it must be clear what the heads share: head {self._heads.names[index]!r} reads tensors that "
                f"require grad, {[list(tensor.shape) for tensor in others]}, but not as its first argument. Name the "
                "modules that they come from: feature='backbone', or feature=['layer3', 'layer4']."
            )
        if others and not self._named and not self._told_of_other_tensors:
            self._told_of_other_tensors = True
            warnings.warn(
                f"head {self._heads.names[index]!r} also reads a tensor {list(others[0].shape)} that requires grad; "
                "gradients through it are not weighed. If the heads share it, name all that they share: feature=['layer3', "
                "'layer4'].",
                UserWarning,
                stacklevel=2,
            )
        return [source]
