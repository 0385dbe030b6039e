"""Losses of tasks whose labels may be missing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ....errors import WrongTypeError
from ....torch_tools import at_least_float32
from ..errors import LabelError, UnknownTaskError
from .head_config import HeadConfig

#: Of a missing label, as everywhere in transformers; NaN is one, too, for labels that are floats.
IGNORE_INDEX = -100


def check_tasks(labels: object, tasks: Mapping[str, HeadConfig]) -> dict[str, Tensor]:
    """Return those tasks of ``labels`` that have any, in the order of the tasks."""
    if not isinstance(labels, Mapping):
        found = f"a tensor of shape {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise WrongTypeError(
            f"labels must be a dictionary {{task: tensor}}, found {found}. Pass labels={{{next(iter(tasks))!r}: ...}}; "
            "MultiTaskCollator makes such batches."
        )
    if unknown := [task for task in labels if task not in tasks]:
        raise UnknownTaskError(f"labels names {unknown}, which are no tasks. The tasks are {list(tasks)}.")
    given = {task: labels[task] for task in tasks if labels.get(task) is not None}
    if not given:
        raise LabelError(
            f"labels has no task of {list(tasks)}, so there is no loss. For a batch without labels leave labels= out; for "
            f"missing ones pass tensors with {IGNORE_INDEX}."
        )
    for task, own in given.items():
        if not isinstance(own, Tensor):
            raise WrongTypeError(
                f"the labels of task {task!r} must be a tensor, found {type(own).__name__}. Use torch.tensor(...)."
            )
    return given


def task_loss(task: str, config: HeadConfig, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(sum of the losses of known labels, their number)``, both 0-dim.

    Logits are ``[B]``, ``[B, K]``, ``[B, L]`` or ``[B, L, K]``; labels have their shape, or are classes ``[B]``, ``[B, L]``.
    """
    losses, known = _elementwise(task, config, logits, labels)
    return losses.sum(), known.sum()


def losses_per_sample(task: str, config: HeadConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``[B]``, the mean over a sample's known labels, 0 where it has none; for ``target="loss"``."""
    losses, known = _elementwise(task, config, logits, labels)
    return losses.reshape(len(losses), -1).sum(1) / known.reshape(len(known), -1).sum(1).clamp(min=1)


def known_labels(labels: Tensor) -> Tensor:
    """Return where a label is there."""
    if labels.dtype in (torch.bool, torch.uint8):  # cannot hold it: -100 would be compared as 156
        return torch.ones_like(labels, dtype=torch.bool)
    known = labels != IGNORE_INDEX
    return known & ~torch.isnan(labels) if labels.is_floating_point() else known


def _elementwise(task: str, config: HeadConfig, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses, 0 where a label is missing, and where one is known, both of the shape of the labels."""
    labels = labels.to(logits.device)
    shape = logits.shape[:-1] if config.problem == "single_label" else logits.shape
    if labels.shape == (*shape, 1):  # a column
        labels = labels.squeeze(-1)
    if labels.shape != shape:
        raise LabelError(
            f"the labels of task {task!r} have shape {list(labels.shape)}, its logits {list(logits.shape)}: expected labels "
            f"{list(shape)}. {_shape_advice(config)}"
        )
    known = known_labels(labels)
    _check_range(task, config, labels, known)
    logits = precise(logits)
    safe = torch.where(known, labels, 0)
    if config.problem == "single_label":
        flat = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), safe.reshape(-1).long(), reduction="none")
        losses = flat.reshape(shape)
    elif config.problem == "regression":
        losses = (logits - safe.to(logits)).square()
    else:
        losses = functional.binary_cross_entropy_with_logits(logits, safe.to(logits), reduction="none")
    return losses.masked_fill(~known, 0.0), known


def precise(logits: Tensor) -> Tensor:
    """Return the logits in at least float32."""
    return logits.to(at_least_float32(logits.dtype))


def _check_range(task: str, config: HeadConfig, labels: Tensor, known: Tensor) -> None:
    """Check on a CPU only: elsewhere it would wait for the device, and cross entropy has its own check there."""
    if labels.device.type != "cpu" or config.problem == "regression" or not known.any():
        return
    values = labels[known]
    low, high = float(values.min()), float(values.max())
    most = config.num_labels - 1 if config.problem == "single_label" else 1
    if low < 0 or high > most or (values.is_floating_point() and bool((values != values.round()).any())):
        what = "0 or 1"
        advice = "For numbers use HeadConfig(problem='regression'), for classes HeadConfig(num_labels=...)."
        if config.problem == "single_label":
            what = f"whole numbers from 0 to {most}"
            advice = "Use HeadConfig(num_labels=...) with the number of classes."
        raise LabelError(
            f"the labels of task {task!r} go from {low:g} to {high:g}, expected {what} ({IGNORE_INDEX} where one is "
            f"missing). {advice}"
        )


def _shape_advice(config: HeadConfig) -> str:
    if config.level == "token":
        return "A token head wants a label for each token: pad them with -100 (MultiTaskCollator does)."
    if config.problem == "single_label":
        return "For several yes-or-no labels per sample use HeadConfig(K, problem='multi_label')."
    if config.num_labels > 1:
        return f"This head wants {config.num_labels} columns; for one class per sample pass problem='single_label'."
    return "For a prediction on each token use HeadConfig(..., level='token')."


def zero_loss(logits: Mapping[str, Tensor]) -> Tensor:
    """Return 0 with a graph to all logits, so that a batch without a known label has a backward pass."""
    return sum(own.float().sum() * 0.0 for own in logits.values())  # type: ignore[return-value]  # there is a task
