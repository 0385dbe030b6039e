"""From a captured forward to the saliencies of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..capture import CapturedForward, FeatureMap, is_plain_linear
from ..errors import MissingArgumentError, ShapeError, TaskError, WrongTypeError
from ..tasks import Losses, losses_per_task, per_task
from ..torch_tools import check_choice
from .input_gradients import check_graph, each_reads_its_own, input_gradients
from .pooling import check_mask, check_pool, gradient_scale, pool_positions, resolve_channel_axis
from .scalars import ScalarizeChoice, axis_of_columns, scalar_of, scalarize_per_task

TARGETS = ("output", "loss")
LOSS_REDUCTIONS = ("mean", "sum")


@dataclass
class Given:
    """What a user passed in one call.

    Attributes:
        losses: of the tasks, or their sum.
        targets: class labels.
        mask: ``[B, positions...]``, or one for each feature map.
        outputs: of the tasks, if they were passed by hand.
    """

    losses: Losses | Tensor | None = None
    targets: Mapping[str, Tensor] | Sequence[Tensor] | None = None
    mask: Tensor | Sequence[Tensor | None] | None = None
    outputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None


@dataclass
class Saliencies:
    """Saliencies of the tasks that ran.

    Attributes:
        present: their task indices, t of them.
        values: ``[t, B, ...]``, or ``[t, 1, C]`` where all samples have the same.
        batch_size: B.
        closed_form: whether they are weight rows of the heads.
        determine_gradients: whether they are all there is to know of heads with one output per sample, so that a task's
            gradient at the feature map is its saliency times a number for each sample.
    """

    present: list[int]
    values: Tensor
    batch_size: int
    closed_form: bool = False
    determine_gradients: bool = False

    @property
    def comparable(self) -> bool:
        """Whether there are distances between them."""
        return len(self.present) >= 2 and self.batch_size > 0


class SaliencyExtractor:
    """Takes the saliencies of one forward.

    Args:
        tasks: T names.
        target: ``"output"`` or ``"loss"``.
        scalarize, pool, channel_axis: as in :func:`task_saliencies`.
        loss_reduction: what 0-dim losses are: the ``"mean"`` over the batch, or its ``"sum"``.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        target: str,
        scalarize: ScalarizeChoice,
        pool: str | None,
        channel_axis: int | Sequence[int | None] | None,
        loss_reduction: str,
    ) -> None:
        check_choice("target", target, TARGETS)
        check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS)
        check_pool(pool)
        self.tasks = tuple(tasks)
        self.target = target
        self.choices = scalarize_per_task(scalarize, self.tasks)
        self.pool = pool
        self.channel_axis = channel_axis
        self.loss_reduction = loss_reduction
        self._known_separate: dict[tuple[int, ...], set[int]] = {}
        self._heads_mix = False

    def extract(
        self, forward: CapturedForward, given: Given, *, create_graph: bool, only: Sequence[int] | None = None
    ) -> Saliencies:
        """Differentiate, and join the saliencies of several feature maps.

        ``only`` are the tasks of this step, all that ran by default.
        """
        if not forward.features:
            return Saliencies([], torch.zeros(0, 0, 1, device=forward.device), 0)
        axes = _per_feature(self.channel_axis, len(forward.features), "channel_axis")
        masks = _per_feature(given.mask, len(forward.features), "mask")
        chosen = None if only is None else set(only)
        parts = [
            self._at_feature(forward, feature, axis, given, mask, create_graph, chosen)
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
        channel_axis: int | None,
        given: Given,
        mask: Tensor | None,
        create_graph: bool,
        chosen: set[int] | None,
    ) -> Saliencies:
        tensor = feature.tensor
        axis = resolve_channel_axis(tensor.shape, channel_axis)
        check_mask(mask, tensor.shape, axis)
        labels = {} if given.targets is None else per_task(given.targets, self.tasks, "targets")
        if self.target == "output" and self._has_closed_form(forward, feature, axis):
            return self._closed_form(forward, tensor, mask, axis, chosen)
        if self.target == "loss":
            by_task = self._loss_scalars(given.losses, forward, tensor.shape[0])
        else:
            outputs = self._columns(forward.outputs[0], tensor, axis) if forward.columns else forward.outputs
            by_task = {
                task: scalar_of(
                    output,
                    self.choices[task],
                    labels.get(task),
                    task=self.tasks[task],
                    feature_shape=tensor.shape,
                    channel_axis=axis,
                )
                for task, output in zip(forward.tasks(len(self.tasks)), outputs)
                if chosen is None or task in chosen
            }
        if chosen is not None:
            by_task = {task: scalar for task, scalar in by_task.items() if task in chosen}
        present, scalars = list(by_task), list(by_task.values())
        if not present:
            return Saliencies([], tensor.new_zeros(0, tensor.shape[0], 1), tensor.shape[0])
        names = [self.tasks[task] for task in present]
        check_graph(scalars, names, self.target)
        by_head = dict(zip(forward.ran, feature.edges))
        edges = [feature.edges[0] if forward.columns else by_head[task] for task in present]
        at_once = feature.separate and not forward.columns
        if at_once and self._mix(present, scalars, forward.ran, feature):
            at_once = False
            edges = [[own[0] for own in feature.edges]] * len(present)
        scale = gradient_scale(tensor.shape, axis)
        gradients = input_gradients(scalars, edges, names, at_once=at_once, scale=scale, create_graph=create_graph)
        pooled = [pool_positions(gradient, self.pool, mask, axis, scale) for gradient in gradients]
        determine_gradients = (
            at_once
            and feature.direct
            and self.target == "output"
            and mask is None
            and (self.pool is None or tensor.ndim == 2)
            and present == forward.ran
            and all(output.numel() == len(tensor) for output in forward.outputs)
            and not any(callable(choice) for choice in self.choices)
        )
        return Saliencies(present, torch.stack(pooled), tensor.shape[0], determine_gradients=determine_gradients)

    def _mix(self, present: Sequence[int], scalars: Sequence[Tensor], ran: Sequence[int], feature: FeatureMap) -> bool:
        """Whether heads read each other's outputs, which needs a call per task. Checked once for each task.

        Against all heads that ran, also those whose tasks are not in this step: a path may lead through them.
        """
        known = self._known_separate.setdefault(tuple(ran), set())
        if not self._heads_mix and not known.issuperset(present):
            own = [ran.index(task) for task in present]
            self._heads_mix = not each_reads_its_own(scalars, own, [edges[0] for edges in feature.edges])
            known.update(present)
        return self._heads_mix

    def _columns(self, output: Tensor, feature: Tensor, axis: int) -> list[Tensor]:
        column_axis = axis_of_columns(output, len(self.tasks), feature.shape, axis)
        return [output.narrow(column_axis, task, 1) for task in range(len(self.tasks))]

    def _loss_scalars(
        self, losses: Losses | Tensor | None, forward: CapturedForward, batch_size: int
    ) -> dict[int, Tensor]:
        if losses is None:
            raise MissingArgumentError(
                "target='loss' takes the saliency of the task losses. Pass regularizer(losses={task: loss, ...}) with the "
                "losses before weighting."
            )
        scalars: dict[int, Tensor] = {}
        for task, loss in losses_per_task(losses, self.tasks).items():
            if not forward.columns and task not in forward.ran:
                raise TaskError(
                    f"losses= has an entry for {self.tasks[task]!r}, whose head did not run in this forward."
                )
            if not isinstance(loss, Tensor):
                raise WrongTypeError(
                    f"the loss of task {self.tasks[task]!r} must be a tensor, found {type(loss).__name__}."
                )
            # Back to the gradient of each sample's own loss.
            factor = batch_size if loss.ndim == 0 and self.loss_reduction == "mean" else 1
            if loss.ndim > 1 or (loss.ndim == 1 and loss.shape[0] != batch_size):
                raise ShapeError(
                    f"the loss of task {self.tasks[task]!r} has shape {list(loss.shape)}, expected a 0-dim mean over the "
                    f"batch, or one value per sample, [{batch_size}]."
                )
            scalars[task] = (loss.float() if loss.dtype == torch.float16 else loss).sum() * factor
        return scalars

    def _has_closed_form(self, forward: CapturedForward, feature: FeatureMap, axis: int) -> bool:
        """A ``Linear`` fed by the feature map itself: its weight rows are the saliencies, whatever the sample."""
        if not forward.modules or not feature.direct or axis != feature.tensor.ndim - 1:
            return False
        if any(callable(choice) for choice in self.choices):
            return False
        ran = [forward.modules[index] for index in forward.ran]
        width = len(self.tasks) if forward.columns else 1
        return all(is_plain_linear(head) and head.out_features == width for head in ran)

    def _closed_form(
        self, forward: CapturedForward, feature: Tensor, mask: Tensor | None, axis: int, chosen: set[int] | None
    ) -> Saliencies:
        rows = torch.cat([forward.modules[index].get_parameter("weight") for index in forward.ran])  # [T, C]
        present = list(forward.tasks(len(self.tasks)))
        if chosen is not None:
            kept = [row for row, task in enumerate(present) if task in chosen]
            rows, present = rows[kept], [present[row] for row in kept]
        if feature.ndim == 2:
            values = pool_positions(rows, self.pool, None, 1, 1.0).unsqueeze(1)
        else:
            spread = [row.expand(feature.shape) for row in rows]
            values = torch.stack([pool_positions(each, self.pool, mask, axis, 1.0) for each in spread])
        return Saliencies(present, values, feature.shape[0], closed_form=True)


def _per_feature(value: Any, number: int, what: str) -> list[Any]:
    if isinstance(value, (list, tuple)):
        if len(value) != number:
            raise ShapeError(f"{what}= has {len(value)} entries for {number} feature maps. Pass one for each.")
        return list(value)
    return [value] * number
