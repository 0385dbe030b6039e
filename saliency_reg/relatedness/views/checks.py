"""Whether what a view is made of fits together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigurationError, NonFiniteError, ShapeError, WrongTypeError
from ...tasks import first_few
from .kinds import VIEWS, ViewKind

#: By which entries may miss their range, or a matrix its transpose, as a share of the largest entry: float32 was used.
_ROUNDING = 1e-5


def checked_matrices(
    matrices: Mapping[str, Tensor], tasks: Sequence[str], *, of: str = "matrices", parts: bool = False
) -> dict[str, Tensor]:
    """Return ``{view: [T, T]}``, or with ``parts`` ``[S, T, T]``, float64 on the CPU and in the order of the views."""
    if not isinstance(matrices, Mapping):
        raise WrongTypeError(f"{of} must be {{view: [T, T]}}, found {type(matrices).__name__}. Pass a dict.")
    if unknown := [key for key in matrices if key not in VIEWS]:
        raise ConfigurationError(f"{of} has the unknown views {unknown}. The views are {', '.join(VIEWS)}.")
    found = {}
    for key in VIEWS:
        if key in matrices:
            what = f"{of}[{key!r}]"
            matrix = checked_tensor(matrices[key], what).to("cpu", torch.float64)
            _check_shape(matrix, what, len(tasks), parts)
            _check_entries(VIEWS[key], matrix, what, tasks)
            if len(matrix):  # of no part nothing is kept
                found[key] = matrix
    return found


def checked_counts(counts: Tensor, tasks: Sequence[str]) -> Tensor:
    """Return ``[T, T]`` int64 counts of labels."""
    counts = checked_tensor(counts, "common_labels").to("cpu")
    _check_shape(counts, "common_labels", len(tasks), parts=False)
    if not bool((counts >= 0).all()) or not torch.equal(counts, counts.T) or bool((counts != counts.long()).any()):
        raise ConfigurationError("common_labels must be whole numbers >= 0 and symmetric. Use known.T @ known.")
    return counts.long()


def checked_skill(skill: Tensor | None, tasks: Sequence[str]) -> Tensor | None:
    """Return ``[T]`` float64, or ``None``."""
    if skill is None:
        return None
    skill = checked_tensor(skill, "skill").to("cpu", torch.float64)
    if skill.shape != (len(tasks),):
        raise ShapeError(f"skill must be [T] = [{len(tasks)}], one number for each task, found {list(skill.shape)}.")
    return skill


def checked_affinity(affinity: Any, tasks: Sequence[str] | None = None) -> Tensor:
    """Return an affinity ``[T, T]`` as float64 on the CPU: symmetric, in ``[0, 1]``, without NaN.

    Raises:
        WrongTypeError, ShapeError: no ``[T, T]`` tensor, or one for another number of tasks.
        NonFiniteError: NaN or infinity; names the pairs.
        ConfigurationError: entries outside of ``[0, 1]``, or a matrix that is not symmetric.
    """
    matrix = checked_tensor(affinity, "affinity").to("cpu", torch.float64)
    _check_shape(matrix, "affinity", len(matrix) if tasks is None and matrix.ndim else len(tasks or ()), parts=False)
    names = tuple(map(str, range(len(matrix)))) if tasks is None else tasks
    refuse_unknown(matrix, names, "affinity", "Pass a number in [0, 1] for each of them.")
    _check_entries(ViewKind("affinity", "Affinity", lowest=0.0, highest=1.0), matrix, "affinity", names)
    return ((matrix + matrix.T) / 2).clamp(0, 1)


def refuse_unknown(matrix: Tensor, tasks: Sequence[str], what: str, advice: str) -> None:
    """Raise an error that names the pairs of which ``[T, T]`` knows nothing."""
    unknown = ~matrix.isfinite()
    if not bool(unknown.any()):
        return
    # A task of which nothing is known would be in all pairs: it is named alone.
    off = unknown | torch.eye(len(tasks), dtype=torch.bool)
    silent = [task for task, all_unknown in zip(tasks, off.all(1).tolist()) if all_unknown]
    pairs = [
        f"{tasks[i]!r} and {tasks[j]!r}" if i != j else repr(tasks[i])
        for i, j in (unknown | unknown.T).triu().nonzero().tolist()
        if tasks[i] not in silent and tasks[j] not in silent
    ]
    alone = [f"of {first_few([repr(task) for task in silent])} with any other task"] if silent else []
    named = "; ".join([*alone, *([f"of {first_few(pairs)}"] if pairs else [])])
    raise NonFiniteError(f"{what} knows nothing {named}. {advice}")


def checked_tensor(value: Any, what: str) -> Tensor:
    """Return a tensor of real numbers, without a graph."""
    if not isinstance(value, Tensor):
        raise WrongTypeError(f"{what} must be a tensor, found {type(value).__name__}. Use torch.as_tensor(...).")
    if value.is_complex():
        raise WrongTypeError(f"{what} must be real, found {value.dtype}.")
    return value.detach()


def _check_shape(matrix: Tensor, what: str, count: int, parts: bool) -> None:
    if matrix.ndim != 2 + parts or matrix.shape[-2:] != (count, count):
        axes, sizes = ("[S, T, T]", f"[S, {count}, {count}]") if parts else ("[T, T]", f"[{count}, {count}]")
        raise ShapeError(f"{what} must be {axes} = {sizes} for {count} tasks, found {list(matrix.shape)}.")


def _check_entries(kind: ViewKind, matrix: Tensor, what: str, tasks: Sequence[str]) -> None:
    infinite = matrix.isinf()
    if bool(infinite.any()):
        i, j = infinite.nonzero()[0, -2:].tolist()
        raise NonFiniteError(
            f"{what} is infinite for {tasks[i]!r} and {tasks[j]!r}. Pass NaN where nothing is known of a pair."
        )
    known = matrix[~matrix.isnan()]
    if not known.numel():
        return
    slack = _ROUNDING * max(1.0, float(known.abs().max()))
    if float(known.min()) < kind.lowest - slack or float(known.max()) > kind.highest + slack:
        raise ConfigurationError(
            f"{what} must be in [{kind.lowest:g}, {kind.highest:g}], found entries from {float(known.min()):.6g} to "
            f"{float(known.max()) + 0.0:.6g}."
        )
    turned = matrix.transpose(-1, -2)
    differs = (matrix - turned).abs().nan_to_num(0.0) > slack
    differs |= matrix.isnan() != turned.isnan()
    if kind.symmetric and bool(differs.any()):
        i, j = differs.nonzero()[0, -2:].tolist()
        raise ConfigurationError(
            f"{what} must be symmetric, and is not for {tasks[i]!r} and {tasks[j]!r}. Use (matrix + matrix.T) / 2."
        )
