"""From a captured forward to the saliencies of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..capture import CapturedForward, FeatureMap, is_plain_linear
from ..errors import MissingArgumentError, ShapeError, TaskError, WrongTypeError
from ..tasks import Losses, losses_per_task, per_task
from ..torch_tools import Edge, check_choice
from .input_gradients import check_graph, input_gradients, reads_another
from .pooling import Pooling
from .scalars import ScalarizeChoice, axis_of_columns, scalar_of, scalarize_per_task


@dataclass
class Given:
    """What a user passed in one call."""

    losses: Losses | Tensor | None = None  # of the tasks, or their sum
    targets: Mapping[str, Tensor] | Sequence[Tensor] | None = None  # class labels
    mask: Tensor | Sequence[Tensor | None] | None = None  # [B, positions...], or one for each feature map
    outputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None  # of the tasks, if they were passed by hand


@dataclass
class Saliencies:
    """Saliencies of the tasks that ran."""

    present: list[int]  # their task indices, t of them
    values: Tensor  # [t, B, ...], or [t, 1, C] where all samples have the same
    batch_size: int  # B
    closed_form: bool = False  # whether they are weight rows of the heads
    #: Whether each head has one output per sample and nothing was pooled away: the gradient of a task's loss at the feature
    #: map is then dL/ds[b] * saliency[b].
    determine_gradients: bool = False

    @property
    def comparable(self) -> bool:
        """Whether there are distances between them."""
        return len(self.present) >= 2 and self.batch_size > 0


@dataclass(eq=False)
class SaliencyExtractor:
    """Takes the saliencies of one forward; the settings are those of :class:`SaliencyRegularizer`."""

    tasks: Sequence[str]
    _: KW_ONLY
    target: str
    scalarize: ScalarizeChoice
    pool: str | None
    channel_axis: int | Sequence[int | None] | None
    loss_reduction: str
    _known_separate: dict[tuple[int, ...], set[int]] = field(init=False, default_factory=dict)
    _heads_mix: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        check_choice("target", self.target, ("output", "loss"))
        check_choice("loss_reduction", self.loss_reduction, ("mean", "sum"))
        self.tasks = tuple(self.tasks)
        self.choices = scalarize_per_task(self.scalarize, self.tasks)

    def extract(
        self, forward: CapturedForward, given: Given, *, create_graph: bool, only: Sequence[int] | None = None
    ) -> Saliencies:
        """Differentiate, and join the saliencies of several feature maps; ``only`` are the tasks of this step."""
        if not forward.features:
            return Saliencies([], torch.zeros(0, 0, 1, device=forward.device), 0)
        axes = _per_feature(self.channel_axis, len(forward.features), "channel_axis")
        masks = _per_feature(given.mask, len(forward.features), "mask")
        chosen = set(forward.tasks(len(self.tasks)) if only is None else only)
        parts = [
            self._at_feature(
                forward, feature, Pooling(feature.tensor.shape, axis, self.pool, mask), given, chosen, create_graph
            )
            for feature, axis, mask in zip(forward.features, axes, masks)
        ]
        if len(parts) == 1:
            return parts[0]
        size = parts[0].batch_size
        if any(part.batch_size != size for part in parts):
            raise ShapeError(
                f"the feature maps have batch sizes {[part.batch_size for part in parts]}; they must have one in common."
            )
        flat = [part.values.expand(-1, size, *part.values.shape[2:]).flatten(2) for part in parts]
        return Saliencies(parts[0].present, torch.cat(flat, 2), size, all(part.closed_form for part in parts))

    def _at_feature(
        self,
        forward: CapturedForward,
        feature: FeatureMap,
        pooling: Pooling,
        given: Given,
        chosen: set[int],
        create_graph: bool,
    ) -> Saliencies:
        tensor = feature.tensor
        labels = {} if given.targets is None else per_task(given.targets, self.tasks, "targets")
        if self.target == "loss":
            by_task = self._of_losses(given.losses, forward, len(tensor), chosen)
        elif (rows := self._closed_form(forward, feature, pooling, chosen)) is not None:
            return rows
        else:
            by_task = self._of_outputs(forward, tensor.shape, pooling.channel_axis, labels, chosen)
        if not by_task:
            return Saliencies([], tensor.new_zeros(0, len(tensor), 1), len(tensor))
        present, scalars, names = list(by_task), list(by_task.values()), [self.tasks[task] for task in by_task]
        check_graph(scalars, names, self.target)
        edges: list[Sequence[Edge]]
        if forward.columns:
            edges, at_once = [[feature.edges[0]]] * len(present), False
        elif feature.separate and self._mix(by_task, forward.ran, feature):
            edges, at_once = [feature.edges] * len(present), False
        else:
            edges, at_once = [[feature.edges[forward.ran.index(task)]] for task in present], feature.separate
        values = input_gradients(
            scalars, edges, names, pooling, at_once=at_once, create_graph=create_graph, of_map=feature.gradient
        )
        determine_gradients = (
            at_once
            and feature.direct
            and self.target == "output"
            and pooling.keeps_all
            and present == forward.ran
            and all(output.numel() == len(tensor) for output in forward.outputs)
            and not any(map(callable, self.choices))
        )
        return Saliencies(present, values, len(tensor), determine_gradients=determine_gradients)

    def _of_outputs(
        self, forward: CapturedForward, shape: torch.Size, axis: int, labels: Mapping[int, Tensor], chosen: set[int]
    ) -> dict[int, Tensor]:
        outputs = forward.outputs
        if forward.columns:
            column_axis = axis_of_columns(outputs[0], len(self.tasks), shape, axis)
            outputs = [outputs[0].narrow(column_axis, task, 1) for task in range(len(self.tasks))]
        scalar = partial(scalar_of, feature_shape=shape, channel_axis=axis)
        return {
            task: scalar(output, self.choices[task], labels.get(task), task=self.tasks[task])
            for task, output in zip(forward.tasks(len(self.tasks)), outputs)
            if task in chosen
        }

    def _of_losses(
        self, losses: Losses | Tensor | None, forward: CapturedForward, batch_size: int, chosen: set[int]
    ) -> dict[int, Tensor]:
        if losses is None:
            raise MissingArgumentError(
                "target='loss' takes the saliency of the task losses. Pass regularizer(losses={task: loss, ...}) with the "
                "losses before weighting."
            )
        scalars: dict[int, Tensor] = {}
        for task, loss in losses_per_task(losses, self.tasks).items():
            if task not in forward.tasks(len(self.tasks)):
                raise TaskError(
                    f"losses= has an entry for {self.tasks[task]!r}, whose head did not run in this forward."
                )
            if not isinstance(loss, Tensor):
                raise WrongTypeError(
                    f"the loss of task {self.tasks[task]!r} must be a tensor, found {type(loss).__name__}."
                )
            if loss.ndim > 1 or (loss.ndim == 1 and loss.shape[0] != batch_size):
                raise ShapeError(
                    f"the loss of task {self.tasks[task]!r} has shape {list(loss.shape)}, expected a 0-dim mean over the "
                    f"batch, or one value per sample, [{batch_size}]."
                )
            if task in chosen:
                # Back to the gradient of each sample's own loss.
                factor = batch_size if loss.ndim == 0 and self.loss_reduction == "mean" else 1
                scalars[task] = (loss.float() if loss.dtype == torch.float16 else loss).sum() * factor
        return scalars

    def _mix(self, scalars: Mapping[int, Tensor], ran: Sequence[int], feature: FeatureMap) -> bool:
        """Whether heads read each other's outputs, which needs a call per task. Checked once for each task.

        Against all heads that ran, also those whose tasks are not in this step: a path may lead through them.
        """
        known = self._known_separate.setdefault(tuple(ran), set())
        if not self._heads_mix and not known.issuperset(scalars):
            pairs = ((scalar, ran.index(task)) for task, scalar in scalars.items())
            self._heads_mix = any(reads_another(scalar, own, feature.edges) for scalar, own in pairs)
            known.update(scalars)
        return self._heads_mix

    def _closed_form(
        self, forward: CapturedForward, feature: FeatureMap, pooling: Pooling, chosen: set[int]
    ) -> Saliencies | None:
        """Return the weight rows of ``Linear`` heads that read the feature map itself: theirs, whatever the sample."""
        shape = feature.tensor.shape
        if not forward.modules or not feature.direct or pooling.channel_axis != len(shape) - 1:
            return None
        heads = [forward.modules[index] for index in forward.ran]
        width = len(self.tasks) if forward.columns else 1
        linear = all(is_plain_linear(head) and head.out_features == width for head in heads)
        if not linear or any(map(callable, self.choices)):
            return None
        rows = torch.cat([head.get_parameter("weight") for head in heads])  # [T, C]
        ran = forward.tasks(len(self.tasks))
        present = [task for task in ran if task in chosen]
        if len(present) < len(ran):
            rows = rows[[row for row, task in enumerate(ran) if task in chosen]]
        if len(shape) == 2:
            values = pooling.pooled(rows).unsqueeze(1)
        else:
            values = torch.stack([pooling.pooled(row.expand(shape)) for row in rows])
        return Saliencies(present, values, shape[0], closed_form=True)


def _per_feature(value: Any, number: int, what: str) -> list[Any]:
    if isinstance(value, (list, tuple)):
        if len(value) != number:
            raise ShapeError(f"{what}= has {len(value)} entries for {number} feature maps. Pass one for each.")
        return list(value)
    return [value] * number
