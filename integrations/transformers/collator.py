"""Batches for a multi-task model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saliency_reg.errors import WrongTypeError

from .configuration import MultiTaskConfig
from .errors import LabelError, UnknownTaskError
from .head_config import HeadConfig
from .losses import IGNORE_INDEX

__all__ = ["MultiTaskCollator"]


class MultiTaskCollator:
    """Examples with ``labels = {task: label}`` to a batch; what an example lacks is a missing label.

    For examples of several data sets, each labelled for its own task, as for one with gaps. Token labels are padded with
    -100 to the length of the batch.

    Args:
        model: a :class:`MultiTaskModel`, or its configuration.
        tokenizer: pads the inputs, whatever has ``pad()``; without one (images) inputs are stacked.
        pad_options: of ``tokenizer.pad``: ``pad_to_multiple_of=8``, ``padding="max_length"``, ...

    Raises:
        WrongTypeError: no multi-task model; in a call: examples without inputs, or labels that are no dictionary.
        UnknownTaskError: in a call: a task that the model does not have.
        LabelError: in a call: labels of one task that differ in shape.

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
        """A batch of inputs ``[B, ...]`` and ``labels`` ``{task: [B, ...]}`` for the tasks that any example has."""
        labels = [self._checked(example.get("labels")) for example in examples]
        inputs = [{name: value for name, value in example.items() if name != "labels"} for example in examples]
        if not inputs or not inputs[0]:
            raise WrongTypeError("the examples hold no inputs, expected input_ids, pixel_values or the like.")
        batch: dict[str, Any]
        if self._tokenizer is None:
            batch = {name: torch.stack([torch.as_tensor(one[name]) for one in inputs]) for name in inputs[0]}
        else:
            batch = dict(self._tokenizer.pad(inputs, return_tensors="pt", **self._pad_options))
        length = next((value.shape[1] for value in batch.values() if value.ndim > 1), 0)
        named = [task for task in self._heads if any(task in own for own in labels)]
        if named:
            batch["labels"] = {task: self._column(task, [own.get(task) for own in labels], length) for task in named}
        return batch

    def _checked(self, labels: Any) -> Mapping[str, Any]:
        if labels is None:
            return {}
        if not isinstance(labels, Mapping):
            raise WrongTypeError(
                f"the labels of an example must be a dictionary {{task: label}}, found {type(labels).__name__}. Type "
                f"{{'labels': {{{next(iter(self._heads))!r}: ...}}, ...}}."
            )
        if unknown := [task for task in labels if task not in self._heads]:
            raise UnknownTaskError(f"labels names {unknown}, which are no tasks. The tasks are {list(self._heads)}.")
        return {task: own for task, own in labels.items() if own is not None}

    def _column(self, task: str, given: Sequence[Any], length: int) -> Tensor:
        config = self._heads[task]
        dtype = torch.long if config.problem == "single_label" else torch.get_default_dtype()
        rows = [None if own is None else torch.as_tensor(own).to(dtype) for own in given]
        shape = _shape(config, length)
        padded = []
        for row in rows:
            if row is None:
                padded.append(torch.full(shape, IGNORE_INDEX, dtype=dtype))
                continue
            if config.level == "token" and row.ndim and len(row) < length:
                row = torch.cat([row, torch.full((length - len(row), *row.shape[1:]), IGNORE_INDEX, dtype=dtype)])
            if list(row.shape) != shape:
                raise LabelError(
                    f"a label of task {task!r} has shape {list(row.shape)}, expected {shape}"
                    + (f": one for each of {length} tokens." if config.level == "token" else ".")
                    + " Truncate labels as the tokenizer truncates texts, or describe the head as the labels are."
                )
            padded.append(row)
        return torch.stack(padded)


def _shape(config: HeadConfig, length: int) -> list[int]:
    """Of the labels of one example."""
    positions = [length] if config.level == "token" else []
    several = [] if config.problem == "single_label" or config.num_labels == 1 else [config.num_labels]
    return positions + several
