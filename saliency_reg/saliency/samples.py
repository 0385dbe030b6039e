"""Which axis of a feature map holds the samples, and which of them the heads have read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..capture import CapturedForward
from ..errors import ShapeError
from .pooling import resolve_batch_axis


def batch_first(forward: CapturedForward, batch_axis: int | Sequence[int]) -> None:
    """Say where the feature maps have their samples, and move those of outputs with as many axes to the front."""
    for feature, axis in zip(forward.features, per_feature(batch_axis, len(forward.features), "batch_axis")):
        feature.batch_axis = resolve_batch_axis(feature.tensor.shape, axis)
    if forward.features:
        shape, axis = forward.features[0].tensor.shape, forward.features[0].batch_axis
        forward.outputs = [
            output.movedim(axis, 0)
            if isinstance(output, Tensor) and output.ndim == len(shape) and output.shape[axis] == shape[axis]
            else output
            for output in forward.outputs
        ]


class Rows:
    """Tells heads that read rows of their own from heads that pool rows, as of graphs; both have fewer outputs."""

    own: bool | None = None  # not known until outputs have another number of samples

    def read_by_all(
        self,
        present: Sequence[int],
        values: Tensor,
        forward: CapturedForward,
        tasks: Sequence[str],
        real: Tensor | None,
    ) -> Tensor | None:
        """Return ``[B]``, which rows of the map count; ``None``: all. Refuse heads that read different ones."""
        size = values.shape[1]
        outputs = {task: len(output) for task, output in zip(forward.ran, forward.outputs) if output.ndim > 0}
        complete = all(number == size for number in outputs.values())
        if self.own is False or real is not None or forward.heads_alone or complete:
            return real
        read = values.detach().flatten(2).ne(0).any(2)  # [t, B]
        counts = read.sum(1).tolist()
        # A graph that was pooled has more rows than outputs.
        self.own = any(count <= outputs.get(task, 0) < size for task, count in zip(present, counts))
        if not self.own:
            return None
        rows, together = max(outputs.get(task, 0) for task in present), read.any(0)
        missing = rows - int(together.sum())
        if missing < 0 or len({outputs.get(task) for task in present}) > 1:
            listed = ", ".join(f"{tasks[task]!r} {count}" for task, count in list(zip(present, counts))[:6])
            raise ShapeError(
                f"the heads read different rows of the {size} in the feature map ({listed}): these saliencies cannot be "
                "compared. Run each head on the whole feature map, and take its rows behind it: head(feature)[rows] in "
                "place of head(feature[rows])."
            )
        # Rows that no head reacts to differ nowhere: any others will do.
        together[(~together).nonzero()[:missing, 0]] = True
        return together


def per_feature(value: Any, number: int, what: str) -> list[Any]:
    """Return a value for each feature map, of one for all or a list of them."""
    if isinstance(value, (list, tuple)):
        if len(value) != number:
            raise ShapeError(f"{what}= has {len(value)} entries for {number} feature maps. Pass one for each.")
        return list(value)
    return [value] * number
