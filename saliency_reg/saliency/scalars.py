"""From a task's output to the one number per sample (or position) that is differentiated. New choices go into the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Union

import torch
from torch import Tensor

from ..errors import ConfigurationError, MissingArgumentError, ShapeError, WrongTypeError
from ..tasks import per_task
from ..torch_tools import at_least_float32
from .pooling import position_sizes

Scalarize = Union[str, Callable[..., Tensor]]
#: What the public ``scalarize=`` accepts: one choice for all tasks, or one per task (a mapping may leave some out).
ScalarizeChoice = Union[Scalarize, Mapping[str, Scalarize], Sequence[Scalarize]]

#: PyTorch's own default ``ignore_index``: positions with this label contribute nothing.
IGNORED_LABEL = -100


def _auto(logits: Tensor) -> Tensor:
    # Of two logits the prediction depends on the difference alone. Always in this order: the largest minus the mean would
    # take another sign where the predictions of two tasks differ, so that a bias alone would part them.
    if logits.shape[-1] == 2:
        return logits[..., 1] - logits[..., 0]
    return logits.amax(-1) - logits.mean(-1)


#: Logits ``[..., K]`` to one number each ``[...]``.
SCALARIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "auto": _auto,
    "max": lambda logits: logits.amax(-1),
    "logsumexp": lambda logits: logits.logsumexp(-1),
    "sum": lambda logits: logits.sum(-1),
}
#: Logits to scores of the same shape, of which that of the label is taken.
LABEL_SCALARIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "label": lambda logits: logits,
    "label_log_probability": lambda logits: logits.log_softmax(-1),
}
#: Those whose derivative with respect to the logits is constant almost everywhere.
PIECEWISE_LINEAR_SCALARIZATIONS = ("auto", "max", "sum", "label")


def check_scalarize(scalarize: ScalarizeChoice) -> None:
    """Refuse a choice that does not exist."""
    if isinstance(scalarize, Mapping):
        scalarize = list(scalarize.values())
    if isinstance(scalarize, str) or not isinstance(scalarize, Sequence):
        scalarize = [scalarize]
    for choice in scalarize:
        if not isinstance(choice, str) and not callable(choice):
            raise WrongTypeError(
                f"scalarize must be a name, a callable, or one of them per task; found {type(choice).__name__}."
            )
        known = (*SCALARIZATIONS, *LABEL_SCALARIZATIONS)
        if isinstance(choice, str) and choice not in known:
            raise ConfigurationError(
                f"unknown scalarize {choice!r}. Choose one of {', '.join(map(repr, known))}, or pass a "
                "callable such as scalarize=lambda output: output[:, 0]."
            )


def scalarize_per_task(scalarize: ScalarizeChoice, tasks: Sequence[str]) -> list[Scalarize]:
    """Spread the choice over the tasks: a name or callable serves all; ``"auto"`` is for those that a mapping leaves out."""
    check_scalarize(scalarize)
    if isinstance(scalarize, str) or callable(scalarize):
        return [scalarize] * len(tasks)
    chosen = per_task(scalarize, tasks, "scalarize=")
    return [chosen.get(index, "auto") for index in range(len(tasks))]


def scalar_of(
    output: Tensor,
    scalarize: Scalarize,
    target: Tensor | None,
    *,
    task: str,
    feature_shape: torch.Size,
    channel_axis: int,
) -> Tensor:
    """Return ``sum_b s[b]``, 0-dim: its gradient at sample ``b`` is that of ``s[b]`` alone.

    A sum, never a mean: a ``1/(B*H*W)`` inside would underflow in float16.
    """
    # Only gradients matter: in float32 the values themselves cannot overflow on the way.
    output = output.to(at_least_float32(output.dtype))
    if callable(scalarize):
        scalar = scalarize(output) if target is None else scalarize(output, target)
        if not isinstance(scalar, Tensor):
            raise WrongTypeError(
                f"the scalarize callable returned {type(scalar).__name__} for task {task!r}. It must return a tensor, "
                "e.g. one value per sample."
            )
        return scalar.sum()
    if output.ndim == 0:
        return output
    if output.shape[0] != feature_shape[0]:
        advice = (
            "A head that reads some of the rows has no saliency at the others: run each head on the whole feature map and "
            "take its rows behind it, head(feature)[rows] in place of head(feature[rows]). A head that pools rows (nodes "
            "of graphs, sets) has a saliency at each row of the feature map: pass a function, such as "
            "scalarize=lambda output: output.sum(-1)"
        )
        if output.shape[0] in feature_shape[1:]:
            axis = list(feature_shape).index(output.shape[0])
            advice = f"If the samples are on axis {axis} of the feature map, pass batch_axis={axis}. " + advice
        raise ShapeError(
            f"the output of task {task!r} has {output.shape[0]} samples, shape {list(output.shape)}, but the feature map "
            f"has {feature_shape[0]}, shape {list(feature_shape)}. {advice}."
        )
    if output.ndim == 1 or scalarize == "sum":
        return output.sum()
    logits = output.movedim(class_axis(output, task, feature_shape, channel_axis), -1)  # [B, positions..., K]
    if logits.shape[-1] == 1:
        return logits.sum()
    if scalarize in SCALARIZATIONS:
        return SCALARIZATIONS[scalarize](logits).sum()
    return _of_label(LABEL_SCALARIZATIONS[scalarize](logits), target, task, scalarize).sum()


def weighed_unequally(output: Tensor) -> Tensor:
    """Return an output with a factor for each entry of a sample; their plain sum may be constant, as that of a softmax."""
    sample = output[:1] if output.ndim else output
    return output.float() * torch.linspace(1, 2, sample.numel(), device=output.device).view(sample.shape)


def _of_label(scores: Tensor, target: Tensor | None, task: str, scalarize: str) -> Tensor:
    if target is None:
        raise MissingArgumentError(
            f"scalarize={scalarize!r} needs the labels of task {task!r}. Pass targets={{{task!r}: labels}}, or choose "
            "scalarize='auto', which needs none."
        )
    if target.dtype.is_floating_point or target.shape != scores.shape[:-1]:
        raise ShapeError(
            f"the targets of task {task!r} must be integer class indices of shape {list(scores.shape[:-1])}, found "
            f"{target.dtype} of shape {list(target.shape)}."
        )
    target = target.to(scores.device, torch.int64)
    ignored = target == IGNORED_LABEL
    index = target.masked_fill(ignored, 0)
    if bool(((index < 0) | (index >= scores.shape[-1])).any()):
        raise ShapeError(
            f"the targets of task {task!r} run from {int(target.min())} to {int(target.max())}, but its output has "
            f"{scores.shape[-1]} classes. Use 0..{scores.shape[-1] - 1}, and {IGNORED_LABEL} for 'no label'."
        )
    return scores.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(ignored, 0)


def class_axis(output: Tensor, task: str, feature_shape: torch.Size, channel_axis: int) -> int:
    """Return the axis of ``output`` that holds classes: where the feature has its channels, else axis 1."""
    if output.ndim == 2:
        return 1
    if output.ndim == len(feature_shape) and (
        channel_axis == 1 or position_sizes(output.shape, channel_axis) == position_sizes(feature_shape, channel_axis)
    ):
        return channel_axis
    if output.ndim >= 4:
        return 1
    raise ShapeError(
        f"cannot tell which axis of the output of task {task!r}, shape {list(output.shape)}, holds classes (the feature map "
        f"has shape {list(feature_shape)}). Pass a callable: scalarize=lambda output: output.sum(1) for one value per "
        "position, scalarize=lambda output: output.amax(-1) - output.mean(-1) for classes on the last axis."
    )
