"""From a captured forward to the saliencies of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..capture.forward import Captured
from ..errors import ConfigurationError, MissingArgumentError, ShapeError, TaskError, WrongTypeError
from ..regularizer.reach import is_plain_linear
from ..surgery.feature.columns import axis_of_columns
from .scalars import ScalarizeChoice, check_scalarize, scalar_of, scalarize_per_task
from .task_saliencies import (
    Feature,
    aligned,
    check_features,
    check_graph,
    check_mask,
    check_pool,
    each_reads_its_own,
    gradient_scale,
    input_gradients,
    named,
    pool_positions,
    resolve_channel_axis,
)

__all__ = ["Evaluated", "Losses", "SaliencyEvaluator", "captured_by_hand", "losses_per_task", "sum_of_losses"]

TARGETS = ("output", "loss")
LOSS_REDUCTIONS = ("mean", "sum")
Losses = Union[Mapping[str, Tensor], Sequence[Tensor]]


@dataclass
class Evaluated:
    """Saliencies of the tasks that ran."""

    present: list[int]  # task indices
    saliencies: Tensor  # [T present, B, ...], or [T present, 1, C] where all samples have the same
    batch_size: int
    closed_form: bool
    edges: list[list[Feature]]
    unpooled: bool = False  # the saliencies are all there is to know of heads with one output per sample


class SaliencyEvaluator:
    """How saliencies are taken: the options of the regularizer that concern a single forward.

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
        if target not in TARGETS:
            raise ConfigurationError(f"unknown target {target!r}. Choose 'output' (the logits) or 'loss'.")
        if loss_reduction not in LOSS_REDUCTIONS:
            raise ConfigurationError(f"unknown loss_reduction {loss_reduction!r}. Choose 'mean' or 'sum'.")
        check_pool(pool)
        check_scalarize(scalarize)
        self.tasks = tuple(tasks)
        self.target = target
        self.scalarize = scalarize
        self.choices = scalarize_per_task(scalarize, self.tasks)
        self.pool = pool
        self.channel_axis = channel_axis
        self.loss_reduction = loss_reduction
        self._known_separate: dict[tuple[int, ...], set[int]] = {}
        self._heads_mix = False

    def describe(self) -> str:
        """The options, for a person."""
        scalarize = repr(self.scalarize) if isinstance(self.scalarize, str) else "a callable or one per task"
        return f"{self.target} gradient, scalarize={scalarize}, pool={self.pool!r}"

    def evaluate(
        self,
        captured: Sequence[Captured],
        heads: Sequence[nn.Module],
        columns: bool,
        *,
        losses: Losses | Tensor | None,
        targets: Mapping[str, Tensor] | Sequence[Tensor] | None,
        mask: Tensor | Sequence[Tensor | None] | None,
        create_graph: bool,
        only: Sequence[int] | None = None,
    ) -> Evaluated:
        """Differentiate, and join the saliencies of several feature maps.

        ``heads`` are the modules behind the outputs, empty where outputs were given by hand; ``only`` are the tasks
        that take part in this step, all that ran by default.
        """
        axes = self._per_feature(self.channel_axis, len(captured), "channel_axis")
        masks = self._per_feature(mask, len(captured), "mask")
        chosen = None if only is None else set(only)
        parts = [
            self._evaluate_one(one, heads, columns, axis, losses, targets, own_mask, create_graph, chosen)
            for one, axis, own_mask in zip(captured, axes, masks)
        ]
        if len(parts) == 1:
            return parts[0]
        size = parts[0].batch_size
        if any(part.batch_size != size for part in parts):
            raise ShapeError(
                f"the feature maps have batch sizes {[part.batch_size for part in parts]}; they must have one in common."
            )
        flat = [part.saliencies.expand(-1, size, *part.saliencies.shape[2:]).flatten(2) for part in parts]
        edges = [[edge for part in parts for edge in part.edges[index]] for index in range(len(parts[0].edges))]
        return Evaluated(parts[0].present, torch.cat(flat, 2), size, all(part.closed_form for part in parts), edges)

    @staticmethod
    def _per_feature(value: Any, number: int, what: str) -> list[Any]:
        if isinstance(value, (list, tuple)):
            if len(value) != number:
                raise ShapeError(f"{what}= has {len(value)} entries for {number} feature maps. Pass one for each.")
            return list(value)
        return [value] * number

    def _evaluate_one(
        self,
        captured: Captured,
        heads: Sequence[nn.Module],
        columns: bool,
        channel_axis: int | None,
        losses: Losses | Tensor | None,
        targets: Mapping[str, Tensor] | Sequence[Tensor] | None,
        mask: Tensor | None,
        create_graph: bool,
        chosen: set[int] | None,
    ) -> Evaluated:
        feature = captured.feature
        axis = resolve_channel_axis(feature.shape, channel_axis)
        check_mask(mask, feature.shape, axis)
        labels = aligned(targets, self.tasks, "targets")
        if self.target == "output" and self._has_closed_form(captured, heads, columns, axis):
            return self._closed_form(captured, heads, columns, mask, axis, chosen)
        if self.target == "loss":
            by_task = self._loss_scalars(losses, captured, columns, feature.shape[0])
        else:
            outputs = self._columns(captured.outputs[0], feature, axis) if columns else captured.outputs
            ran = range(len(self.tasks)) if columns else captured.present
            by_task = {
                task: self._scalar(task, output, labels[task], feature.shape, axis)
                for task, output in zip(ran, outputs)
                if chosen is None or task in chosen
            }
        if chosen is not None:
            by_task = {task: scalar for task, scalar in by_task.items() if task in chosen}
        present, scalars = list(by_task), list(by_task.values())
        if not present:
            return Evaluated([], feature.new_zeros(0, feature.shape[0], 1), feature.shape[0], False, captured.edges)
        names = [self.tasks[task] for task in present]
        check_graph(scalars, names, self.target)
        places = captured.edges * len(self.tasks) if columns else dict(zip(captured.present, captured.edges))
        edges = [places[task] for task in present]
        at_once = captured.separate and not columns
        if at_once and self._mix(present, scalars, captured):
            at_once = False
            edges = [[own[0] for own in captured.edges]] * len(present)
        scale = gradient_scale(feature.shape, axis)
        gradients = input_gradients(scalars, edges, names, at_once=at_once, scale=scale, create_graph=create_graph)
        pooled = [pool_positions(gradient, self.pool, mask, axis, scale) for gradient in gradients]
        unpooled = (
            at_once
            and captured.direct
            and self.target == "output"
            and mask is None
            and (self.pool is None or feature.ndim == 2)
            and present == captured.present
            and all(output.numel() == len(feature) for output in captured.outputs)
            and not any(callable(choice) for choice in self.choices)
        )
        return Evaluated(present, torch.stack(pooled), feature.shape[0], False, captured.edges, unpooled)

    def _scalar(self, task: int, output: Tensor, label: Tensor | None, shape: torch.Size, axis: int) -> Tensor:
        return scalar_of(
            output, self.choices[task], label, task=self.tasks[task], feature_shape=shape, channel_axis=axis
        )

    def _mix(self, present: Sequence[int], scalars: Sequence[Tensor], captured: Captured) -> bool:
        """Whether heads read each other's outputs, which needs a call per task. Checked once for each task.

        Against all heads that ran, also those whose tasks take no part in this step: a path may lead through them.
        """
        known = self._known_separate.setdefault(tuple(captured.present), set())
        if not self._heads_mix and not known.issuperset(present):
            own = [captured.present.index(task) for task in present]
            self._heads_mix = not each_reads_its_own(scalars, own, [places[0] for places in captured.edges])
            known.update(present)
        return self._heads_mix

    def _columns(self, output: Tensor, feature: Tensor, axis: int) -> list[Tensor]:
        column_axis = axis_of_columns(output, len(self.tasks), feature.shape, axis)
        return [output.narrow(column_axis, task, 1) for task in range(len(self.tasks))]

    def _loss_scalars(
        self, losses: Losses | Tensor | None, captured: Captured, columns: bool, batch_size: int
    ) -> dict[int, Tensor]:
        if losses is None:
            raise MissingArgumentError(
                "target='loss' takes the saliency of the task losses. Type regularizer(losses={task: loss, ...}) with the "
                "losses before weighting."
            )
        found = losses_per_task(losses, self.tasks)
        scalars: dict[int, Tensor] = {}
        for task, loss in found.items():
            if not columns and task not in captured.present:
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

    def _has_closed_form(self, captured: Captured, heads: Sequence[nn.Module], columns: bool, axis: int) -> bool:
        """A ``Linear`` fed by the feature map itself: its weight rows are the saliencies, whatever the sample."""
        if not heads or not captured.direct or axis != captured.feature.ndim - 1:
            return False
        if any(callable(choice) for choice in self.choices):
            return False
        ran = [heads[index] for index in captured.present]
        width = len(self.tasks) if columns else 1
        return all(is_plain_linear(head) and head.out_features == width for head in ran)

    def _closed_form(
        self,
        captured: Captured,
        heads: Sequence[nn.Module],
        columns: bool,
        mask: Tensor | None,
        axis: int,
        chosen: set[int] | None,
    ) -> Evaluated:
        feature = captured.feature
        rows = torch.cat([heads[index].get_parameter("weight") for index in captured.present])  # [T, C]
        present = list(range(len(self.tasks))) if columns else captured.present
        if chosen is not None:
            kept = [row for row, task in enumerate(present) if task in chosen]
            rows, present = rows[kept], [present[row] for row in kept]
        if feature.ndim == 2:
            saliencies = pool_positions(rows, self.pool, None, 1, 1.0).unsqueeze(1)
        else:
            spread = [row.expand(feature.shape) for row in rows]
            saliencies = torch.stack([pool_positions(each, self.pool, mask, axis, 1.0) for each in spread])
        return Evaluated(present, saliencies, feature.shape[0], True, captured.edges)


def captured_by_hand(
    outputs: Mapping[str, Tensor] | Sequence[Tensor] | None,
    features: Tensor | Sequence[Tensor] | None,
    tasks: Sequence[str],
) -> list[Captured] | None:
    """Outputs and feature that the user passed, as if they had been captured; ``None`` if they carry no graph."""
    if outputs is None or features is None:
        missing = "features" if features is None else "outputs"
        raise MissingArgumentError(f"outputs= and features= go together; {missing}= is missing.")
    names, tensors = named(outputs, "outputs")
    if not isinstance(outputs, Mapping):
        if len(tensors) != len(tasks):
            raise TaskError(f"outputs= has {len(tensors)} entries for {len(tasks)} tasks. Pass one for each task.")
        names = list(tasks)
    if unknown := [name for name in names if name not in tasks]:
        raise TaskError(f"outputs= names {unknown}, which are not tasks. The tasks are {list(tasks)}.")
    if not any(isinstance(output, Tensor) and output.requires_grad for output in tensors):
        return None
    aliases = check_features(features, len(tensors))
    # In the order of the tasks, as everywhere.
    present, order = zip(*sorted((tasks.index(name), given) for given, name in enumerate(names)))
    edges: list[list[Feature]] = [[aliases[given if len(aliases) > 1 else 0]] for given in order]
    in_order = [tensors[given] for given in order]
    return [Captured(aliases[0], list(present), in_order, edges, separate=len(aliases) > 1, direct=False)]


def losses_per_task(losses: Losses | Tensor, tasks: Sequence[str]) -> dict[int, Tensor]:
    """Task index to loss, in the order of the tasks. A mapping may leave tasks out; a sequence may not."""
    if isinstance(losses, Mapping):
        if unknown := [task for task in losses if task not in tasks]:
            raise TaskError(f"losses= names {unknown}, which are not tasks. The tasks are {list(tasks)}.")
        return {index: losses[task] for index, task in enumerate(tasks) if task in losses}
    if isinstance(losses, Tensor) or not isinstance(losses, Sequence):
        found = type(losses).__name__
        if isinstance(losses, Tensor):
            found += f" of shape {list(losses.shape)}. Type losses.unbind() for [T], losses.unbind(1) for [B, T]"
        raise WrongTypeError(f"losses must be a mapping {{task: loss}} or a sequence of T losses, found {found}.")
    if len(losses) != len(tasks):
        raise TaskError(
            f"losses= has {len(losses)} entries for {len(tasks)} tasks. Pass one for each task, or a mapping."
        )
    return dict(enumerate(losses))


def sum_of_losses(losses: Losses | Tensor | None, tasks: Sequence[str], device: torch.device) -> Tensor | None:
    """The sum of the task losses, detached; per-sample losses count with their mean. One 0-dim tensor is that sum."""
    if losses is None:
        return None
    if isinstance(losses, Tensor) and losses.ndim == 0:
        return losses.detach().float().to(device)
    found = [
        torch.as_tensor(loss).detach().float().mean().to(device) for loss in losses_per_task(losses, tasks).values()
    ]
    return torch.stack(found).sum() if found else None
