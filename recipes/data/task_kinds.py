"""What a task predicts, and what its labels look like."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..runtime.errors import DataError

_KINDS = ("binary", "classes", "number")


@dataclass(frozen=True)
class TaskKind:
    """One kind of task. Labels are floats; NaN is a missing label.

    Attributes:
        name: ``"binary"`` (labels 0 and 1), ``"classes"`` (labels 0 to K-1) or ``"number"`` (any finite number).
        classes: K, the number of outputs; 1 for binary tasks and numbers.
        mean, spread: of the training labels of a number: its model predicts ``(label - mean) / spread``.
        unit: errors of a number are told in; ``spread`` if ``None``. The same for all draws of training rows that are
            compared.
    """

    name: str
    classes: int = 1
    mean: float = 0.0
    spread: float = 1.0
    unit: float | None = None

    def __post_init__(self) -> None:
        if self.name not in _KINDS:
            raise DataError(f"found the kind of task {self.name!r}. Use one of {', '.join(_KINDS)}.")
        if (self.classes == 1) == (self.name == "classes") or self.classes < 1:
            raise DataError(
                f"a task of kind {self.name!r} cannot have {self.classes} outputs. Use 2 or more for 'classes', and 1 for "
                "the others."
            )
        unit = self.error_unit
        if not (all(map(math.isfinite, (self.mean, self.spread, unit))) and self.spread > 0 and unit > 0):
            raise DataError(
                f"mean, spread and unit must be finite, the latter two above 0; found {self.mean}, {self.spread}, {unit}."
            )

    @property
    def error_unit(self) -> float:
        """What the error of a number is divided by."""
        return self.spread if self.unit is None else self.unit

    @property
    def score(self) -> str:
        """The metric that a model is chosen by; more is better, but for ``nmse``."""
        return {"binary": "auc", "classes": "accuracy", "number": "nmse"}[self.name]

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)


BINARY = TaskKind("binary")


def columns_of(kinds: Mapping[str, TaskKind] | Sequence[TaskKind]) -> list[slice]:
    """Where the outputs of each task are if those of all are side by side."""
    found, start = [], 0
    for kind in kinds.values() if isinstance(kinds, Mapping) else kinds:
        found.append(slice(start, start + kind.classes))
        start += kind.classes
    return found
