"""From a captured forward to the saliencies of its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..capture import CapturedForward, FeatureMap, is_product
from ..errors import MissingArgumentError, ShapeError, TaskError, WrongTypeError
from ..tasks import Losses, losses_per_task, per_task
from ..torch_tools import Edge, check_choice
from .channel_axis import channel_axis_by_origin, check_batch_first
from .fixed_statistics import HeadsNow, fixed_statistics, heads_as_they_are
from .input_gradients import check_graph, input_gradients, reads_another
from .pooling import Pooling
from .samples import Rows, per_feature
from .scalars import ScalarizeChoice, scalar_of, scalarize_per_task
from .task_columns import task_columns
from .vanishing import Vanishing


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
    real: Tensor | None = None  # [B], the samples that have a real position and count; None: all
    #: What to tell of tasks that ran and are missing, because their saliency is nothing but rounding; None: there are none.
    left_out: Sequence[str] | None = None
    heads_now: HeadsNow | None = None  # if that was looked at
    channel_axis: int | None = None  # of one map, counted without the tasks; None where several were joined

    @property
    def samples(self) -> int | Tensor:
        """How many samples count."""
        return self.batch_size if self.real is None else self.real.sum()

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
    fix_statistics: bool = False  # of a BatchNorm in train mode, in the derivative
    #: Task to the tasks whose feature it is known not to read, as a bit mask.
    _known_separate: dict[int, int] = field(init=False, default_factory=dict)
    _heads_mix: bool = field(init=False, default=False)
    _without_batch_norm: HeadsNow = field(init=False, default=frozenset())
    #: Of maps with three axes, where that was not given: found in the first forward, and kept.
    _channel_axes: dict[int, int | None] | None = field(init=False, default=None)
    #: Tasks that had a saliency once, which are compared from then on.
    have_saliency: set[int] = field(init=False, default_factory=set)
    _vanishing: Vanishing | None = field(init=False, default=None)
    _rows: Rows | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        check_choice("target", self.target, ("output", "loss"))
        check_choice("loss_reduction", self.loss_reduction, ("mean", "sum"))
        self.tasks = tuple(self.tasks)
        self.choices = scalarize_per_task(self.scalarize, self.tasks)

    def take_from(self, before: SaliencyExtractor, order: Sequence[int | None]) -> None:
        """Go on from that of other tasks: of each task of this one its index there, ``None`` for a new one."""
        self.have_saliency.update(new for new, old in enumerate(order) if old in before.have_saliency)
        self._channel_axes = before._channel_axes

    def extract(
        self, forward: CapturedForward, given: Given, *, create_graph: bool, only: Sequence[int] | None = None
    ) -> Saliencies:
        """Differentiate, and join the saliencies of several feature maps; ``only`` are the tasks of this step."""
        if not forward.features:
            return Saliencies([], torch.zeros(0, 0, 1, device=forward.device), 0)
        axes = per_feature(self.channel_axis, len(forward.features), "channel_axis")
        masks = per_feature(given.mask, len(forward.features), "mask")
        chosen = set(forward.tasks(len(self.tasks)) if only is None else only)
        poolings = [
            Pooling(feature.tensor.shape, self._channel_axis(index, axis, forward), self.pool, mask, feature.batch_axis)
            for index, (feature, axis, mask) in enumerate(zip(forward.features, axes, masks))
        ]
        parts = [
            self._at_feature(forward, feature, pooling, given, chosen, create_graph)
            for feature, pooling in zip(forward.features, poolings)
        ]
        found = _side_by_side(parts)
        if found.batch_size == 0 or not found.present or found.closed_form:
            return found
        if not forward.columns and (self.target == "loss" or any(map(callable, self.choices))):
            self._rows = self._rows or Rows()
            found.real = self._rows.read_by_all(found.present, found.values, forward, self.tasks, found.real)
        return self._with_saliency(found, forward, poolings) if self.target == "output" and create_graph else found

    def _channel_axis(self, index: int, given: int | None, forward: CapturedForward) -> int | None:
        feature = forward.features[index]
        if feature.tensor.ndim != 3 or feature.batch_axis != 0:
            return given
        if self._channel_axes is None:
            self._channel_axes = {}
        if index not in self._channel_axes:
            check_batch_first(feature.tensor)
            head = forward.modules[forward.ran[0]] if forward.modules and feature.direct else None
            self._channel_axes[index] = channel_axis_by_origin(feature.tensor, feature.made_by, head)
        return self._channel_axes[index] if given is None else given

    def _with_saliency(self, found: Saliencies, forward: CapturedForward, poolings: Sequence[Pooling]) -> Saliencies:
        """Leave out tasks whose saliency is nothing but rounding."""
        if self._vanishing is None:
            self._vanishing = Vanishing(self.tasks, self.choices, self.have_saliency)
        without, why = self._vanishing.among(found.present, found.values, forward, poolings, found.real)
        if not without:
            return found
        kept = [row for row, task in enumerate(found.present) if task not in without]
        present, values = [found.present[row] for row in kept], found.values[kept]
        return replace(found, present=present, values=values, determine_gradients=False, left_out=why)

    def _at_feature(
        self,
        forward: CapturedForward,
        feature: FeatureMap,
        pooling: Pooling,
        given: Given,
        chosen: set[int],
        create_graph: bool,
    ) -> Saliencies:
        shape = pooling.shape
        labels = {} if given.targets is None else per_task(given.targets, self.tasks, "targets")
        if self.target == "loss":
            by_task = self._of_losses(given.losses, forward, shape[0], chosen)
        elif (rows := self._closed_form(forward, feature, pooling, chosen)) is not None:
            return rows
        else:
            by_task = self._of_outputs(forward, shape, pooling.channel_axis, labels, chosen)
        if not by_task:
            return Saliencies([], feature.tensor.new_zeros(0, shape[0], 1), shape[0])
        present, scalars, names = list(by_task), list(by_task.values()), [self.tasks[task] for task in by_task]
        check_graph(scalars, names, self.target)
        at_once = feature.separate and not forward.columns
        edges: list[Sequence[Edge]] = [[feature.edges[forward.row_of(task)]] for task in present]
        if at_once and self._mix(by_task, forward.ran, feature):
            edges, at_once = [feature.edges] * len(present), False
        # Behind a named feature map there may be a BatchNorm outside of the heads.
        heads_now = heads_as_they_are(forward) if self.fix_statistics else None
        fix = heads_now is not None and not (feature.direct and heads_now <= self._without_batch_norm)
        fixing = fixed_statistics(forward.outputs, feature.edges, forward.modules) if fix else nullcontext(False)
        with fixing as fixed:
            values = input_gradients(
                scalars,
                edges,
                names,
                pooling,
                at_once=at_once,
                create_graph=create_graph,
                of_map=feature.gradient,
                shared=forward.shared,
            )
        if heads_now is not None and fix and not fixed:
            self._without_batch_norm |= heads_now
        determine_gradients = (
            at_once
            and not fixed
            and feature.direct
            and self.target == "output"
            and pooling.keeps_all
            and present == forward.ran
            and feature.batch_axis == 0
            and all(output.numel() == shape[0] for output in forward.outputs)
            and not any(map(callable, self.choices))
        )
        real = None if pooling.real is None else pooling.real.to(values.device)
        return Saliencies(
            present,
            values,
            shape[0],
            determine_gradients=determine_gradients,
            real=real,
            heads_now=heads_now,
            channel_axis=pooling.channel_axis,
        )

    def _of_outputs(
        self, forward: CapturedForward, shape: torch.Size, axis: int, labels: Mapping[int, Tensor], chosen: set[int]
    ) -> dict[int, Tensor]:
        outputs = forward.outputs
        if forward.columns:
            columns = task_columns(outputs[0], len(self.tasks), shape, axis, forward.groups)
            outputs = [columns.part(outputs[0], task) for task in range(len(self.tasks))]
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
        """Whether heads read each other's outputs, which needs a call per task. Checked once for each pair of tasks.

        Against all heads that ran, also those whose tasks are not in this step: a path may lead through them.
        """
        here = sum(1 << task for task in ran)
        known = self._known_separate
        unknown = [task for task in scalars if here & ~(known.get(task, 0) | 1 << task)]
        if unknown and not self._heads_mix:
            self._heads_mix = any(reads_another(scalars[task], ran.index(task), feature.edges) for task in unknown)
            known.update({task: known.get(task, 0) | here for task in unknown})
        return self._heads_mix

    def _closed_form(
        self, forward: CapturedForward, feature: FeatureMap, pooling: Pooling, chosen: set[int]
    ) -> Saliencies | None:
        """Return the weight rows of ``Linear`` heads that read the feature map itself: theirs, whatever the sample.

        Only if they are what the outputs of this forward were computed with.
        """
        shape = feature.tensor.shape
        last = len(shape) - 1
        if (
            not forward.modules
            or forward.groups
            or not feature.direct
            or pooling.channel_axis != last
            or feature.batch_axis % len(shape) == last
        ):
            return None
        heads = [forward.modules[index] for index in forward.ran]
        width = len(self.tasks) if forward.columns else 1
        runs = zip(heads, forward.weights, forward.outputs, feature.edges)
        if any(map(callable, self.choices)) or not all(
            weight is not None and head.out_features == width and is_product(head, weight, output, edge)
            for head, weight, output, edge in runs
        ):
            return None
        rows = torch.cat([head.get_parameter("weight") for head in heads])  # [T, C]
        ran = forward.tasks(len(self.tasks))
        present = [task for task in ran if task in chosen]
        if len(present) < len(ran):
            rows = rows[[row for row, task in enumerate(ran) if task in chosen]]
        if len(shape) == 2 and pooling.real is None:
            values = pooling.pooled(rows).unsqueeze(1)
        else:
            values = torch.stack([pooling.pooled(row.expand(shape)) for row in rows])
        real = None if pooling.real is None else pooling.real.to(values.device)
        return Saliencies(present, values, pooling.shape[0], closed_form=True, real=real)


def _side_by_side(parts: Sequence[Saliencies]) -> Saliencies:
    """Join the saliencies at several feature maps."""
    if len(parts) == 1:
        return parts[0]
    size = parts[0].batch_size
    if any(part.batch_size != size for part in parts):
        raise ShapeError(
            f"the feature maps have batch sizes {[part.batch_size for part in parts]}; they must have one in common."
        )
    flat = [part.values.expand(-1, size, *part.values.shape[2:]).flatten(2) for part in parts]
    masks = [part.real for part in parts if part.real is not None]
    real = torch.stack(masks).any(0) if len(masks) == len(parts) else None  # a map without a mask is real everywhere
    closed_form = all(part.closed_form for part in parts)
    return Saliencies(parts[0].present, torch.cat(flat, 2), size, closed_form, real=real)
