"""Input gradients of task outputs with respect to a shared feature map: pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Union

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..errors import ConfigurationError, NonFiniteError, NotConnectedError, ShapeError, TaskError, WrongTypeError
from ..torch_tools.precision import at_least_float32, without_autocast
from .scalars import ScalarizeChoice, scalar_of, scalarize_per_task

__all__ = [
    "POOLS",
    "Feature",
    "check_graph",
    "check_pool",
    "each_reads_its_own",
    "gradient_scale",
    "input_gradients",
    "pool_positions",
    "resolve_channel_axis",
    "task_saliencies",
]

POOLS = ("sum", "mean", None)
#: A tensor, or its place in the graph (which survives an in-place change of the tensor).
Feature = Union[Tensor, GradientEdge]


def task_saliencies(
    outputs: Mapping[str, Tensor] | Sequence[Tensor],
    features: Tensor | Sequence[Tensor],
    *,
    scalarize: ScalarizeChoice = "auto",
    targets: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    pool: str | None = "sum",
    mask: Tensor | None = None,
    channel_axis: int | None = None,
    create_graph: bool = True,
) -> Tensor:
    r"""Saliency (input gradient) of each task with respect to a shared feature map.

    ``G_t = d (sum_b s_t[b]) / dA``, where ``s_t[b]`` is the scalarised output of task ``t`` for sample ``b``, and
    then pooled over positions. Sample ``b`` of the result is the gradient of that sample's own output as long
    as no head mixes samples (a BatchNorm in train mode does).

    Bai and Zhao (KDD 2022), section 3.2: the gradient of the logit, before the sigmoid. The paper averages over
    positions; the authors' code sums (``Z = 1``), and so do we by default: behind global average pooling the
    sum is the head's weight row at any resolution, while the mean shrinks with ``H*W``.

    Args:
        outputs: T task outputs, as a mapping ``{task: output}`` or a sequence. Each is ``[B]``, ``[B, K]``, dense
            ``[B, K, H, W]`` / ``[B, L, K]``, or 0-dim (a loss, differentiated as it is). For dense outputs, the
            classes are on the axis where the feature has its channels, else on axis 1. ``[B, K]`` always has K
            classes: give one value per token as ``[B, L, 1]``.
        features: the feature map ``A``: ``[B, C]``, ``[B, L, C]`` (tokens) or ``[B, C, H, W]``; or a sequence of T
            aliases of it (``A.view_as(A)``), alias ``t`` read by head ``t`` alone, which makes one autograd call do.
        scalarize: the scalar of an output with K classes. ``"auto"`` (largest minus mean logit), ``"max"``,
            ``"logsumexp"``, ``"sum"``, ``"label"`` (logit of the target class), ``"label_log_probability"``, or a
            callable ``output -> tensor`` (``(output, target) -> tensor`` when targets are given), whose entries are
            summed. A mapping or sequence chooses per task. An output with one value is its own scalar. ``"auto"``
            and ``"label_log_probability"`` do not change when a function of the input is added to all logits,
            as the predictions do not; the others do.
        targets: class indices per task, for the ``"label"`` choices: ``[B]`` or ``[B, positions...]``; -100 marks
            "no label" and contributes nothing.
        pool: ``"sum"`` or ``"mean"`` over the unmasked positions, or ``None`` to keep them.
        mask: ``[B, positions...]``, the shape of a feature without its channel axis; true (or non-zero) at real
            positions, false at padding. Masked positions contribute nothing.
        channel_axis: the channel axis of a feature, counted with the batch axis. Default: 1, but 2 (the last) for
            ``[B, L, C]``. Pass 3 for channels-last maps ``[B, H, W, C]``, 1 for ``[B, C, L]`` of a Conv1d.
        create_graph: whether the saliencies can be differentiated. The graph of the outputs is kept either way.

    Returns:
        ``[T, B, C]``, or ``[T, B, ...]`` like the feature for ``pool=None``; float32, or float64 for float64 features.

    Raises:
        TaskError, WrongTypeError, ShapeError, ConfigurationError, MissingArgumentError: bad arguments.
        NotConnectedError: an output carries no graph or does not depend on the feature.
        NonFiniteError: NaN or infinity in the result.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> feature = torch.ones(5, 2, requires_grad=True)
        >>> saliencies = task_saliencies({"first": feature @ weight[0], "second": feature @ weight[1]}, feature)
        >>> saliencies.shape, saliencies[1, 0]
        (torch.Size([2, 5, 2]), tensor([3., 4.]))
    """
    tasks, output_list = named(outputs, "outputs")
    feature_list = check_features(features, len(tasks))
    target_list = aligned(targets, tasks, "targets")
    check_pool(pool)
    shape = feature_list[0].shape
    axis = resolve_channel_axis(shape, channel_axis)
    check_mask(mask, shape, axis)
    scale = gradient_scale(shape, axis)
    scalars = []
    for task, output, choice, target in zip(tasks, output_list, scalarize_per_task(scalarize, tasks), target_list):
        if not isinstance(output, Tensor):
            raise WrongTypeError(f"the output of task {task!r} is a {type(output).__name__}, expected a tensor.")
        scalars.append(scalar_of(output, choice, target, task=task, feature_shape=shape, channel_axis=axis))
    check_graph(scalars, tasks, "output")
    gradients = input_gradients(
        scalars,
        [[feature_list[0 if len(feature_list) == 1 else index]] for index in range(len(tasks))],
        tasks,
        at_once=len(feature_list) > 1,
        scale=scale,
        create_graph=create_graph,
    )
    saliencies = torch.stack([pool_positions(gradient, pool, mask, axis, scale) for gradient in gradients])
    if not torch.isfinite(saliencies).all():
        bad = [task for task, saliency in zip(tasks, saliencies) if not torch.isfinite(saliency).all()]
        raise NonFiniteError(
            f"the saliencies of {bad} hold NaN or infinite values. Look at these outputs and at the feature map; in "
            "mixed precision use SaliencyRegularizer, which lets GradScaler skip such a step."
        )
    return saliencies


def input_gradients(
    scalars: Sequence[Tensor],
    features: Sequence[Sequence[Feature]],
    tasks: Sequence[str],
    *,
    at_once: bool,
    scale: float = 1.0,
    create_graph: bool = True,
) -> list[Tensor]:
    """Gradient of each scalar with respect to its features, added up, times ``scale``.

    ``at_once`` is for scalars each of which depends on no feature but its own single one: one autograd call then
    returns all gradients. Otherwise there is one call per scalar.
    """
    with without_autocast(scalars[0]):
        seeds = [torch.full_like(scalar, scale) for scalar in scalars]
        found: list[Tensor | None]
        if at_once:
            found = list(_grad(scalars, [own[0] for own in features], seeds, create_graph))
        else:
            found = []
            for scalar, own, seed in zip(scalars, features, seeds):
                parts = [part for part in _grad([scalar], own, [seed], create_graph) if part is not None]
                found.append(sum(parts[1:], start=parts[0]) if parts else None)
    if lost := [task for task, gradient in zip(tasks, found) if gradient is None]:
        raise NotConnectedError(
            f"the output of {lost} does not depend on the feature map. Choose a feature that every head reads, and "
            "pass the tensor itself, not a copy or a detached one."
        )
    return [gradient for gradient in found if gradient is not None]


def check_graph(scalars: Sequence[Tensor], tasks: Sequence[str], what: str) -> None:
    """Each scalar must carry a graph."""
    for task, scalar in zip(tasks, scalars):
        if not scalar.requires_grad:
            advice = (
                "Leave the task out of losses= in a step without labels for it"
                if what == "loss"
                else "Compute it with gradients enabled, from a feature map that requires grad (feature.requires_grad_() "
                "behind a frozen backbone)"
            )
            raise NotConnectedError(f"the {what} of task {task!r} carries no graph. {advice}, and do not detach it.")


def each_reads_its_own(scalars: Sequence[Tensor], own: Sequence[int], features: Sequence[Feature]) -> bool:
    """Whether scalar ``t`` depends on no feature but ``features[own[t]]``: heads that read others' outputs do not."""
    for scalar, place in zip(scalars, own):
        found = _grad([scalar], features, [torch.ones_like(scalar)], create_graph=False)
        if any(gradient is not None for other, gradient in enumerate(found) if other != place):
            return False
    return True


def _grad(
    scalars: Sequence[Tensor], features: Sequence[Feature], seeds: Sequence[Tensor], create_graph: bool
) -> tuple[Tensor | None, ...]:
    try:
        return torch.autograd.grad(
            list(scalars),
            list(features),  # type: ignore[arg-type]  # edges are accepted, which older annotations do not say
            grad_outputs=list(seeds),
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise NotConnectedError(
            "the graph of the outputs was freed by a backward pass. Compute the penalty first, add it to the loss, and "
            "call backward once: (loss + regularizer()).backward()."
        ) from error


def pool_positions(gradient: Tensor, pool: str | None, mask: Tensor | None, channel_axis: int, scale: float) -> Tensor:
    """``[B, C, positions...] -> [B, C]`` (or unchanged for ``pool=None``), divided by ``scale``, at least float32."""
    dtype = at_least_float32(gradient.dtype)
    axes = _position_axes(gradient.shape, channel_axis)
    with without_autocast(gradient):
        if mask is not None:
            mask = mask.to(gradient.device) != 0
            gradient = torch.where(mask.unsqueeze(channel_axis), gradient, torch.zeros_like(gradient))
        if pool is None or not axes:
            return gradient.to(dtype) * (1.0 / scale)
        total = gradient.sum(axes, dtype=dtype) * (1.0 / scale)
        if pool == "sum":
            return total
        if mask is None:
            return total / math.prod(gradient.shape[axis] for axis in axes)
        return total / mask.flatten(1).sum(1, keepdim=True).clamp(min=1)


def gradient_scale(shape: torch.Size, channel_axis: int) -> float:
    """A power of two near the number of positions: the gradient behind an average over them stays representable.

    GradScaler does not scale the inner gradient, and ``1/(H*W)`` alone can underflow float16. A power of two is
    exact in every other format.
    """
    positions = math.prod(shape[axis] for axis in _position_axes(shape, channel_axis))
    return float(2 ** min(round(math.log2(max(positions, 1))), 10))


def resolve_channel_axis(shape: torch.Size, channel_axis: int | None) -> int:
    """Return the channel axis as a positive number; the default is 1, or 2 for ``[B, L, C]``."""
    rank = len(shape)
    if rank < 2:
        raise ShapeError(
            f"a feature map must be [B, C], [B, L, C] or [B, C, H, W], found {list(shape)}. Add a channel axis with "
            "feature.unsqueeze(1)."
        )
    if channel_axis is None:
        return 2 if rank == 3 else 1
    axis = channel_axis + rank if channel_axis < 0 else channel_axis
    if not 1 <= axis < rank:
        raise ShapeError(
            f"channel_axis={channel_axis} is not a channel axis of a feature map of shape {list(shape)}. Use 1..{rank - 1}"
            " or -1 (axis 0 is the batch)."
        )
    return axis


def check_pool(pool: str | None) -> None:
    """Raise :class:`ConfigurationError` for a pool that does not exist."""
    if pool not in POOLS:
        raise ConfigurationError(f"unknown pool {pool!r}. Choose 'sum' or 'mean' over positions, or None to keep them.")


def check_mask(mask: Tensor | None, shape: torch.Size, channel_axis: int) -> None:
    """The mask must have the feature's shape without its channel axis."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise WrongTypeError(f"mask must be a tensor, found {type(mask).__name__}.")
    expected = [size for axis, size in enumerate(shape) if axis != channel_axis]
    if len(shape) == 2:
        raise ShapeError(
            f"the feature map {list(shape)} has no positions, so a mask of shape {list(mask.shape)} has nothing to mask. "
            "Leave mask= out, or choose a feature that still has its positions."
        )
    if list(mask.shape) != expected:
        raise ShapeError(
            f"mask has shape {list(mask.shape)}, expected {expected}: the feature map {list(shape)} without its channel "
            f"axis {channel_axis}. Pass channel_axis= if that axis is wrong."
        )


def _position_axes(shape: torch.Size, channel_axis: int) -> list[int]:
    return [axis for axis in range(1, len(shape)) if axis != channel_axis]


def named(values: Mapping[str, Tensor] | Sequence[Tensor], what: str) -> tuple[list[str], list[Tensor]]:
    """Split T tensors into task names (their numbers, for a sequence) and a list."""
    if isinstance(values, Tensor):
        raise WrongTypeError(
            f"{what} must be a mapping or a sequence of T tensors, found one tensor of shape {list(values.shape)}. "
            f"For one column per task type {what}={what}.unbind(1)."
        )
    if isinstance(values, Mapping):
        tasks, tensors = [str(task) for task in values], list(values.values())
    elif isinstance(values, Sequence):
        tasks, tensors = [str(index) for index in range(len(values))], list(values)
    else:
        raise WrongTypeError(f"{what} must be a mapping or a sequence of T tensors, found {type(values).__name__}.")
    if len(tasks) < 2:
        raise TaskError(f"found {len(tasks)} task(s) in {what}; distances between tasks need at least 2.")
    return tasks, tensors


def aligned(
    values: Mapping[str, Tensor] | Sequence[Tensor] | None, tasks: Sequence[str], what: str
) -> list[Tensor | None]:
    """Tensors per task in the order of ``tasks``, ``None`` where a mapping has no entry."""
    if values is None:
        return [None] * len(tasks)
    if isinstance(values, Mapping):
        if unknown := [task for task in values if task not in tasks]:
            raise TaskError(f"{what} names {unknown}, which are not tasks. The tasks are {list(tasks)}.")
        return [values.get(task) for task in tasks]
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise WrongTypeError(f"{what} must be a mapping or a sequence of T tensors, found {type(values).__name__}.")
    if len(values) != len(tasks):
        raise TaskError(f"{what} has {len(values)} entries for {len(tasks)} tasks. Pass one for each task.")
    return list(values)


def check_features(features: Tensor | Sequence[Tensor], num_tasks: int) -> list[Tensor]:
    """The feature map, or its T aliases, as a list of 1 or T tensors that require grad."""
    if isinstance(features, Tensor):
        features = [features] * num_tasks
    if not isinstance(features, Sequence) or not all(isinstance(feature, Tensor) for feature in features):
        raise WrongTypeError(
            f"features must be one tensor, or a sequence of T aliases of it, found {type(features).__name__}."
        )
    if len(features) != num_tasks:
        raise TaskError(
            f"found {len(features)} features for {num_tasks} tasks. Pass one tensor, or one alias per task."
        )
    if any(feature.shape != features[0].shape for feature in features):
        raise ShapeError(
            f"the features have shapes {[list(feature.shape) for feature in features]}; aliases of one feature map must "
            "agree."
        )
    if not all(feature.requires_grad for feature in features):
        raise NotConnectedError(
            f"the feature map, shape {list(features[0].shape)}, does not require grad. Type feature.requires_grad_() "
            "before the heads read it (behind a frozen backbone, or for the model's own input)."
        )
    return [features[0]] if all(feature is features[0] for feature in features) else list(features)
