"""What the user says of features and outputs, as lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

from torch import nn

from ..errors import ConfigurationError, TaskError, WrongTypeError
from .heads import Heads
from .nested import Item

#: What the public ``feature=`` accepts.
FeatureChoice = Union[str, nn.Module, Sequence[Union[str, nn.Module]], None]


def feature_list(feature: FeatureChoice) -> list[Any]:
    if feature is None:
        return []
    if isinstance(feature, nn.Module) or not isinstance(feature, Sequence) or isinstance(feature, str):
        return [feature]
    if not feature:
        raise ConfigurationError("feature= is an empty list. Name a feature map, or leave it out.")
    return list(feature)


def items_per_head(output: Item | Mapping[str, Item | None] | None, heads: Heads) -> list[tuple[Item, ...]]:
    if isinstance(output, Mapping):
        if heads.columns or set(output) != set(heads.tasks):
            raise TaskError(
                f"output= names {list(output)}, but the tasks are {list(heads.tasks)}. Give a part for each head (None for "
                "all of it), or one for all heads: output='logits'."
            )
        parts = [output[task] for task in heads.tasks]
    else:
        parts = [output] * len(heads.modules)
    for part in parts:
        if isinstance(part, bool) or not (part is None or callable(part) or isinstance(part, (int, str))):
            raise WrongTypeError(
                f"output= must be a key, an attribute, an index or a function, found {type(part).__name__}."
            )
    return [() if part is None else (part,) for part in parts]
