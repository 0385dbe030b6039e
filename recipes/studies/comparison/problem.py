"""What a comparison knows about data: samples of the same tasks, and the parts that every architecture is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...data.sources import Collate, Source
from ...data.task_kinds import TaskKind
from ...models.architectures.blueprint import Blueprint
from ..trials import Space


@dataclass(frozen=True)
class Problem:
    """Samples ``(input, labels [T])`` of the same tasks, NaN for missing labels, in three disjoint splits.

    Attributes:
        kinds: of the T tasks.
        train, validation, test: the splits.
        blueprint: backbone and heads.
        collate: single samples to a batch, where a split gives single samples.
    """

    kinds: Mapping[str, TaskKind]
    train: Source
    validation: Source
    test: Source
    blueprint: Blueprint
    collate: Collate | None = None


@dataclass(frozen=True)
class DataSet:
    """Data on which methods are compared.

    Attributes:
        key: its name on the command line.
        label: for titles; names of ``values`` in braces are filled in.
        values: everything that a result depends on but method and seed, by name: sizes, parts of the model, and
            options of the training.
        tasks: how many there are, or about so many: some methods have a network for each.
        build: from these values (others may have been chosen), a place and a seed to the problem of this seed.
        fingerprint: of the data of a place, to tell results on other data apart; empty for data that cannot change.
        metrics: columns of the table.
        compared: metrics whose difference to hard sharing is told; the verdict is about the first.
        spaces: values that are tried where those of all data sets do not fit, by a method's key or by what it tunes.
        place: where the data are by default.
        needs_data: what a place has to be, if there is no default.
        parts: names of values that command lines have options for, such as ``"backbone"``.
    """

    key: str
    label: str
    values: Mapping[str, Any]
    tasks: int | Callable[[Mapping[str, Any]], int]
    build: Callable[[Mapping[str, Any], Any, int], Problem]
    fingerprint: Callable[[Any], str]
    metrics: tuple[str, ...]
    compared: tuple[str, ...]
    spaces: Mapping[str, Space] = field(hash=False, default_factory=dict)
    place: Any = None
    needs_data: str | None = None
    parts: tuple[str, ...] = ()

    def number_of_tasks(self, values: Mapping[str, Any]) -> int:
        """How many tasks there are with these values."""
        return self.tasks(values) if callable(self.tasks) else self.tasks


#: Of binary tasks, and of numbers.
BINARY_METRICS, BINARY_COMPARED = ("auc", "accuracy", "precision", "recall"), ("auc", "accuracy")
NUMBER_METRICS = NUMBER_COMPARED = ("nmse",)
#: Of all trainings; a data set may have others.
COMMON_VALUES: dict[str, Any] = {
    "version": 1,
    "activation": "gelu",
    "weight_decay": 0.0,
    "decay": "cosine",
    "decayed": "all",
    "penalty": "share",
    "temperature": 1.0,
}
