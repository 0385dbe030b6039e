"""What the pictures of ``plot`` accept, as checked numpy arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Union

from torch import Tensor

from ... import RelationWeights, SaliencyRegularizer, SaliencyReport
from ...errors import ConfigurationError, NonFiniteError, ShapeError, TaskError, WrongTypeError
from ..shared.libraries import need

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


#: A tensor, a numpy array, or nested lists of numbers.
Numbers = Union[Tensor, Sequence[Any], Any]
#: ``[T, T]`` weights, or what holds them.
Relations = Union[SaliencyRegularizer, RelationWeights, SaliencyReport, Numbers]

#: Rounding that may make a symmetric matrix differ from its transpose, as a share of the largest weight.
_ROUNDING = 1e-5


def numbers_of(what: str, values: Numbers) -> NDArray[Any]:
    """Return the values as an array of bools, integers or floats, on the CPU and without a graph."""
    numpy = need("numpy")
    if isinstance(values, (str, bytes, dict)):
        raise WrongTypeError(f"{what} must be a tensor, an array or nested lists, found {type(values).__name__}.")
    try:
        array = numpy.asarray(_without_tensors(values))
    except ValueError as error:
        raise ShapeError(f"{what} has lists of different lengths inside. Make them equally long.") from error
    if array.dtype.kind not in "biuf":
        raise WrongTypeError(
            f"{what} must be a tensor, an array or nested lists of real numbers, found {type(values).__name__}"
            f" with dtype {array.dtype}."
        )
    return array  # type: ignore[no-any-return]


def relative_weights(relations: Relations) -> tuple[Array, tuple[str, ...] | None]:
    """Return ``[T, T]`` weights divided by uniform ones (all 0 stay 0), the diagonal 0, and the task names if known."""
    numpy = need("numpy")
    values, tasks = _held_by(relations)
    weights = numbers_of("relations", values).astype(float)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not weights.size:
        raise ShapeError(
            f"relations must be [T, T] for T tasks, found {list(weights.shape)}. Use regularizer, or "
            "regularizer.relations.matrix()."
        )
    numpy.fill_diagonal(weights, 0.0)  # no task has a relation with itself, whatever stands there
    _check_weights(weights, tasks)
    largest = float(weights.max())
    if largest == 0:
        return weights, tasks
    weights = (weights / largest + weights.T / largest) / 2  # first the largest: no overflow
    count = len(weights)
    return weights * (count * (count - 1) / weights.sum()), tasks


def task_names(tasks: Iterable[str] | None, known: Sequence[str] | None, count: int, what: str) -> list[str]:
    """Return ``count`` names: those given, else those known, else numbers."""
    if tasks is None:
        return list(known) if known is not None else [str(index) for index in range(count)]
    if isinstance(tasks, (str, bytes, Tensor)) or not isinstance(tasks, Iterable):
        raise WrongTypeError(
            f"tasks must be a list of names, found {tasks!r:.60} ({type(tasks).__name__}). Pass tasks=['a', 'b'], and "
            "path='picture.png' for the file."
        )
    names = [str(task) for task in tasks]
    if len(names) != count:
        raise TaskError(f"found {len(names)} task names for {what}: {count} tasks. Name each task once.")
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise TaskError(f"the task names {duplicates} occur more than once. Give each task a name of its own.")
    return names


def _held_by(relations: Relations) -> tuple[Numbers, tuple[str, ...] | None]:
    if isinstance(relations, SaliencyRegularizer):
        return relations.relations.matrix(), relations.tasks
    if isinstance(relations, RelationWeights):
        return relations.matrix(), None
    if isinstance(relations, SaliencyReport):
        return relations.relations, relations.tasks
    if relations is None or callable(relations):
        raise WrongTypeError(
            "relations must be a SaliencyRegularizer, RelationWeights, SaliencyReport or a matrix [T, T], found "
            f"{type(relations).__name__}. Pass the regularizer, or regularizer.report after its first call."
        )
    return relations, None


def _check_weights(weights: Array, tasks: Sequence[str] | None) -> None:
    numpy = need("numpy")
    bad = ~numpy.isfinite(weights)
    if bad.any():
        # A task without relations spoils a place in each row: name that task alone.
        whole = numpy.flatnonzero(bad.sum(1) >= max(len(weights) - 1, 1))
        rows = (whole if whole.size else numpy.flatnonzero(bad.any(1))).tolist()
        raise NonFiniteError(
            f"relations holds NaN or infinite weights, of the tasks {[tasks[row] for row in rows] if tasks else rows}. "
            "Leave these rows and columns out, or pass 0 for pairs without a relation."
        )
    if weights.min() < 0:
        raise ConfigurationError(
            f"relations holds negative weights, down to {weights.min():g}; they must be >= 0. Use relations.clamp(min=0), "
            "or (1 + correlation) / 2 for correlations."
        )
    worst = float(abs(weights - weights.T).max())
    if worst > _ROUNDING * weights.max():
        raise ConfigurationError(
            f"relations is not symmetric (W[i, j] and W[j, i] differ by up to {worst:g}). Use (W + W.T) / 2."
        )


def _without_tensors(values: Any) -> Any:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()  # numpy has no bfloat16
    if isinstance(values, (list, tuple)) and any(isinstance(value, (list, tuple, Tensor)) for value in values):
        return [_without_tensors(value) for value in values]
    return values
