"""Input gradients of task outputs with respect to a shared feature map: a pure function of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from ..capture import CapturedForward, FeatureMap
from ..errors import MissingArgumentError, NonFiniteError, NotConnectedError, ShapeError, TaskError, WrongTypeError
from ..tasks import names_of, per_task
from ..torch_tools import check_choice
from .channel_axis import channel_axis_by_origin
from .fixed_statistics import fixed_statistics
from .input_gradients import check_graph, input_gradients
from .pooling import Pooling, check_pool
from .scalars import ScalarizeChoice, scalar_of, scalarize_per_task


def task_saliencies(
    outputs: Mapping[str, Tensor] | Sequence[Tensor],
    features: Tensor | Sequence[Tensor],
    *,
    scalarize: ScalarizeChoice = "auto",
    targets: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    pool: str | None = "sum",
    mask: Tensor | None = None,
    channel_axis: int | None = None,
    batch_axis: int = 0,
    cross_sample: str = "fix",
    create_graph: bool = True,
) -> Tensor:
    r"""Saliency (input gradient) of each task with respect to a shared feature map.

    ``G_t = d (sum_b s_t[b]) / dA``, where ``s_t[b]`` is the scalarised output of task ``t`` for sample ``b``, and
    then pooled over positions. Sample ``b`` of the result is the gradient of that sample's own output as long
    as no head mixes samples, as attention over the batch does. For a BatchNorm in train mode see ``cross_sample``.

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
            summed. A mapping (``"auto"`` for tasks that it leaves out) or sequence chooses per task. An output with one
            value is its own scalar, and for two classes ``"auto"`` is the second logit minus the first. Outputs that are
            no classes (an ordinal head's thresholds, several labels, numbers, boxes) want ``"sum"``. ``"auto"``
            and ``"label_log_probability"`` do not change when a function of the input is added to all logits,
            as the predictions do not; the others do.
        targets: class indices per task, for the ``"label"`` choices: ``[B]`` or ``[B, positions...]``; -100 marks
            "no label" and contributes nothing.
        pool: ``"sum"`` or ``"mean"`` over the unmasked positions, or ``None`` to keep them.
        mask: ``[B, positions...]``, the shape of a feature without its channel axis; true (or non-zero) at real
            positions, false at padding. Masked positions contribute nothing. ``[B]`` masks whole samples.
        channel_axis: the channel axis of a feature, counted with the batch axis. Default: 1, but 2 (the last) for
            ``[B, L, C]``. Pass 3 for channels-last maps ``[B, H, W, C]``, 1 for ``[B, C, L]`` (found where a convolution,
            a BatchNorm or a GroupNorm made the map, but pass it where that is not sure).
        batch_axis: the axis of the samples, in a feature and in outputs with as many axes: 1 for ``[L, B, C]``. A mask is
            ``[B, ...]`` all the same, and so is what is returned.
        cross_sample: ``"fix"``: the statistics of a BatchNorm in train mode are constants in this derivative, so that the
            saliency of a sample is its own. ``"ignore"``: they are differentiated, too.
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
    tasks, output_list = _named(outputs)
    aliases, separate = _checked_features(features, len(tasks))
    labels = {} if targets is None else per_task(targets, tasks, "targets")
    check_pool(pool)
    check_choice("cross_sample", cross_sample, ("fix", "ignore"))
    if channel_axis is None and batch_axis == 0:
        channel_axis = channel_axis_by_origin(aliases[0], None, None)
    pooling = Pooling(aliases[0].shape, channel_axis, pool, mask, batch_axis)
    shape = pooling.shape
    scalar = partial(scalar_of, feature_shape=shape, channel_axis=pooling.channel_axis)
    scalars = []
    for index, (task, output, choice) in enumerate(zip(tasks, output_list, scalarize_per_task(scalarize, tasks))):
        if not isinstance(output, Tensor):
            raise WrongTypeError(f"the output of task {task!r} is a {type(output).__name__}, expected a tensor.")
        if output.ndim == len(shape) and batch_axis != 0:
            output = output.movedim(batch_axis, 0)
        scalars.append(scalar(output, choice, labels.get(index), task=task))
    check_graph(scalars, tasks, "output")
    edges = [[alias] for alias in aliases]
    with fixed_statistics(scalars, aliases) if cross_sample == "fix" else nullcontext():
        saliencies = input_gradients(scalars, edges, tasks, pooling, at_once=separate, create_graph=create_graph)
    if not torch.isfinite(saliencies).all():
        bad = [task for task, saliency in zip(tasks, saliencies) if not torch.isfinite(saliency).all()]
        raise NonFiniteError(
            f"the saliencies of {bad} hold NaN or infinite values. Look at these outputs and at the feature map; in "
            "mixed precision use SaliencyRegularizer, which lets GradScaler skip such a step."
        )
    return saliencies


def _checked_features(features: Tensor | Sequence[Tensor], num_tasks: int) -> tuple[list[Tensor], bool]:
    """Return what each of T tasks reads, all of which require grad, and whether these are different aliases."""
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
            f"the feature map, shape {list(features[0].shape)}, does not require grad. Use feature.requires_grad_() "
            "before the heads read it (behind a frozen backbone, or for the model's own input)."
        )
    return list(features), any(feature is not features[0] for feature in features)


def captured_by_hand(
    outputs: Mapping[str, Tensor] | Sequence[Tensor] | None,
    features: Tensor | Sequence[Tensor] | None,
    tasks: Sequence[str],
) -> CapturedForward | None:
    """Return outputs and feature that the user passed as if they had been captured; ``None`` if they carry no graph."""
    if outputs is None or features is None:
        missing = "features" if features is None else "outputs"
        raise MissingArgumentError(f"outputs= and features= go together; {missing}= is missing.")
    names, tensors = _named(outputs)
    if not isinstance(outputs, Mapping):
        if len(tensors) != len(tasks):
            raise TaskError(f"outputs= has {len(tensors)} entries for {len(tasks)} tasks. Pass one for each task.")
        names = list(tasks)
    by_task = per_task(dict(zip(names, tensors)), tasks, "outputs=")
    if not any(isinstance(output, Tensor) and output.requires_grad for output in tensors):
        return None
    aliases, separate = _checked_features(features, len(tensors))
    edges = list(per_task(dict(zip(names, aliases)), tasks, "features=").values())
    feature = FeatureMap(aliases[0], edges, separate=separate, direct=False)
    return CapturedForward(list(by_task), list(by_task.values()), [feature], aliases[0].device)


def _named(outputs: Mapping[str, Tensor] | Sequence[Tensor]) -> tuple[list[str], list[Tensor]]:
    """Return task names (their numbers, for a sequence) and outputs."""
    advice = "For one column per task pass outputs=outputs.unbind(1)." if isinstance(outputs, Tensor) else ""
    tasks = names_of(outputs, "outputs", advice)
    if len(tasks) < 2:
        raise TaskError(f"found {len(tasks)} task(s) in outputs; distances between tasks need at least 2.")
    return tasks, list(outputs.values() if isinstance(outputs, Mapping) else outputs)
