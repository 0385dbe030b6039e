"""Batches for a multi-task model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import ShapeError, WrongTypeError
from ..errors import LabelError, UnknownTaskError
from .configuration import MultiTaskConfig
from .head_config import HeadConfig
from .losses import IGNORE_INDEX


class MultiTaskCollator:
    """Join examples with ``labels = {task: label}`` to a batch; what an example lacks is a missing label.

    For examples of several data sets, each labelled for its own task, as for one with gaps. Token labels are padded with
    -100 to the length of the batch, on the side of the tokenizer. NaN, and ``None`` in a list, are missing labels, too.

    Args:
        model: a :class:`MultiTaskModel`, or its configuration.
        tokenizer: pads the inputs, whatever has ``pad()``; without one (images) inputs are stacked.
        pad_options: of ``tokenizer.pad``: ``pad_to_multiple_of=8``, ``padding="max_length"``, ...

    Raises:
        WrongTypeError: no multi-task model; in a call: examples without inputs, or labels that are no dictionary.
        ShapeError: in a call: inputs that cannot be stacked.
        UnknownTaskError: in a call: a task that the model does not have.
        LabelError: in a call: labels of one task that differ in shape, or are no numbers.

    Example:
        >>> import torch
        >>> from transformers import BertConfig
        >>> from saliency_reg.integrations.transformers import HeadConfig, MultiTaskCollator, MultiTaskConfig
        >>> collate = MultiTaskCollator(MultiTaskConfig(BertConfig(), {"joy": HeadConfig(), "topic": HeadConfig(4)}))
        >>> batch = collate([
        ...     {"pixel_values": torch.zeros(3, 8, 8), "labels": {"joy": 1}},
        ...     {"pixel_values": torch.zeros(3, 8, 8), "labels": {"topic": 2}},
        ... ])
        >>> batch["labels"]
        {'joy': tensor([   1., -100.]), 'topic': tensor([-100,    2])}
    """

    def __init__(self, model: Any, tokenizer: Any = None, **pad_options: Any) -> None:
        config = model if isinstance(model, MultiTaskConfig) else getattr(model, "config", None)
        if not isinstance(config, MultiTaskConfig):
            raise WrongTypeError(
                f"model must be a MultiTaskModel or its configuration, found {type(model).__name__}. For a classifier of "
                "transformers take DataCollatorWithPadding."
            )
        if tokenizer is not None and not callable(getattr(tokenizer, "pad", None)):
            raise WrongTypeError(f"tokenizer must have a method pad(), found {type(tokenizer).__name__}.")
        self._heads = config.head_configs
        self._tokenizer = tokenizer
        self._pad_options = pad_options

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch of inputs ``[B, ...]`` and ``labels`` ``{task: [B, ...]}``.

        If any example has ``labels``, the batch has those of every task of the model: Trainer joins those of all batches.
        """
        labels = [self._checked(example.get("labels")) for example in examples]
        inputs = [{name: value for name, value in example.items() if name != "labels"} for example in examples]
        if not inputs or not inputs[0]:
            raise WrongTypeError("the examples hold no inputs, expected input_ids, pixel_values or the like.")
        batch: dict[str, Any]
        if self._tokenizer is None:
            batch = {name: _stacked(name, inputs) for name in inputs[0]}
        else:
            batch = dict(self._tokenizer.pad(inputs, return_tensors="pt", **self._pad_options))
        if any(example.get("labels") is not None for example in examples):
            words = [batch[name] for name in ("input_ids", "attention_mask", "inputs_embeds") if name in batch]
            length = next((value.shape[1] for value in [*words, *batch.values()] if value.ndim > 1), 0)
            batch["labels"] = {
                task: self._column(task, [own.get(task) for own in labels], length) for task in self._heads
            }
        return batch

    def _checked(self, labels: Any) -> Mapping[str, Any]:
        if labels is None:
            return {}
        if not isinstance(labels, Mapping):
            raise WrongTypeError(
                f"the labels of an example must be a dictionary {{task: label}}, found {type(labels).__name__}. Use "
                f"{{'labels': {{{next(iter(self._heads))!r}: ...}}, ...}}."
            )
        if unknown := [task for task in labels if task not in self._heads]:
            raise UnknownTaskError(f"labels names {unknown}, which are no tasks. The tasks are {list(self._heads)}.")
        return {task: own for task, own in labels.items() if own is not None}

    def _column(self, task: str, given: Sequence[Any], length: int) -> Tensor:
        config = self._heads[task]
        dtype = torch.long if config.problem == "single_label" else torch.get_default_dtype()
        side = self._pad_options.get("padding_side") or getattr(self._tokenizer, "padding_side", "right")
        shape = _shape(config, length)
        padded = []
        for own in given:
            row = torch.full(shape, IGNORE_INDEX, dtype=dtype) if own is None else _numbers(task, own, dtype)
            if config.level == "token" and row.ndim and len(row) < length:
                more = torch.full((length - len(row), *row.shape[1:]), IGNORE_INDEX, dtype=dtype)
                row = torch.cat([more, row] if side == "left" else [row, more])
            if list(row.shape) != shape:
                raise LabelError(
                    f"a label of task {task!r} has shape {list(row.shape)}, expected {shape}"
                    + (f": one for each of {length} tokens." if config.level == "token" else ".")
                    + " Truncate labels as the tokenizer truncates texts, or describe the head as the labels are."
                )
            padded.append(row)
        return torch.stack(padded)


def _stacked(name: str, inputs: Sequence[Mapping[str, Any]]) -> Tensor:
    values = [torch.as_tensor(one[name]) for one in inputs if name in one]
    shapes = [list(value.shape) for value in values]
    if len(values) < len(inputs) or any(shape != shapes[0] for shape in shapes):
        raise ShapeError(
            f"{name!r} cannot be stacked: {len(values)} of {len(inputs)} examples have it, with shapes {shapes}. Use "
            "MultiTaskCollator(model, tokenizer) to pad texts, or bring the inputs to one shape."
        )
    return torch.stack(values)


def _numbers(task: str, label: Any, dtype: torch.dtype) -> Tensor:
    """Return a label, or those of an example, with -100 for NaN and ``None``."""
    try:
        found = torch.as_tensor(_without_none(label))
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabelError(
            f"a label of task {task!r} holds no numbers, found {label!r}. Pass numbers, classes from 0 on."
        ) from error
    if found.is_floating_point():
        found = found.masked_fill(found.isnan(), IGNORE_INDEX)
        if not dtype.is_floating_point and bool((found != found.round()).any()):
            raise LabelError(f"a label of task {task!r} is {label!r}, expected classes, which are whole numbers.")
    return found.to(dtype)


def _without_none(label: Any) -> Any:
    if isinstance(label, (list, tuple)):
        return [_without_none(each) for each in label]
    return IGNORE_INDEX if label is None else label


def _shape(config: HeadConfig, length: int) -> list[int]:
    """Return the shape of the labels of one example."""
    positions = [length] if config.level == "token" else []
    several = [] if config.problem == "single_label" or config.num_labels == 1 else [config.num_labels]
    return positions + several
