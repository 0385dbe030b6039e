"""Which labels go together: sums over all samples seen, of each pair of tasks over the samples that have both labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import StateMismatchError
from ...torch_tools import StateModule, real_device, state_dtype
from .kinds import BINARY, CLASS, TaskKinds
from .labels import LabelBatch


class LabelTables(StateModule):
    """A task has one column, or with classes one for each, 0 or 1; a missing label is 0 in all of them.

    ``common`` ``[T, T]`` counts the samples with both labels; ``sums`` and ``squares`` ``[C, T]`` are those of a column over
    the samples that also have a label of the task; ``products`` ``[C, C]``.
    """

    any_values: ClassVar[tuple[str, ...]] = ("sums", "products")
    common: Tensor
    sums: Tensor
    squares: Tensor
    products: Tensor

    def __init__(self, kinds: TaskKinds, tasks: int) -> None:
        super().__init__()
        self._kinds = (kinds,)  # no part of this
        device = real_device()
        shapes = {"common": (tasks, tasks), "sums": (0, tasks), "squares": (0, tasks), "products": (0, 0)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=state_dtype(device), device=device))
        self._places: list[int] = [0] * tasks  # of the columns that there are

    def grow(self) -> None:
        """Make room for the columns of tasks that came to have some."""
        columns: list[int] = self._kinds[0].columns.tolist()
        if columns == self._places:
            return
        starts_before, starts = _starts(self._places), _starts(columns)
        kept = [
            (starts_before[task] + column, starts[task] + column)
            for task, number in enumerate(self._places)
            for column in range(number)
        ]
        old, new = [each[0] for each in kept], [each[1] for each in kept]
        for name in ("sums", "squares"):
            before = self._buffers[name]
            assert before is not None
            after = before.new_zeros(sum(columns), before.shape[1])
            after[new] = before[old]
            self._buffers[name] = after
        products = self.products.new_zeros(sum(columns), sum(columns))
        places = torch.tensor(new, dtype=torch.int64)
        if new:
            products[places.unsqueeze(1), places] = self.products
        self._buffers["products"] = products
        self._places = columns

    def of_batch(self, batch: LabelBatch) -> list[Tensor]:
        """Return what a batch adds to the four buffers."""
        kinds, _ = self._kinds[0].now()
        settled = torch.tensor([kind > 0 for kind in kinds], device=batch.known.device)
        known = (batch.known & settled).to(batch.values.dtype)
        values = (batch.values - self._kinds[0].shifts.to(batch.values)) * known
        if all(number == (kind > 0) for number, kind in zip(self._places, kinds)) and CLASS not in kinds:
            columns = (
                values if all(self._places) else values[:, [task for task, number in enumerate(self._places) if number]]
            )
        else:
            columns = torch.cat([self._columns(batch, values, known, task) for task in range(len(kinds))], 1)
        return [known.T @ known, columns.T @ known, columns.square().T @ known, columns.T @ columns]

    def add(self, parts: list[Tensor]) -> None:
        for name, part in zip(("common", "sums", "squares", "products"), parts):
            buffer = self._buffers[name]
            assert buffer is not None
            buffer += part.view_as(buffer)

    def association(self) -> Tensor:
        """Return ``[T, T]``: Pearson's correlation of numbers and binary labels; with classes, what one tells of the other.

        Of two tasks with classes (or one, and a binary one) Cramer's V, corrected for its bias (Bergsma, 2013), of classes
        and a number the square root of epsilon squared (Kelley, 1935), the corrected correlation ratio. Both are in
        ``[0, 1]``, 0 on average for labels that have nothing to do with each other, and have no sign. NaN for a label that
        is constant among the samples in common, and for fewer than two of these.
        """
        kinds, _ = self._kinds[0].now()
        tables = [each.cpu() for each in (self.common, self.sums, self.squares, self.products)]
        size = len(kinds)
        found = torch.full((size, size), torch.nan, dtype=torch.float64)
        starts = _starts(self._places)
        plain = [task for task in range(size) if self._places[task] and kinds[task] != CLASS]
        if plain:
            rows = [starts[task] for task in plain]
            index = torch.tensor(plain)
            place = index.unsqueeze(1), index
            at = torch.tensor(rows)
            own = tables[1][at][:, index], tables[2][at][:, index], tables[3][at.unsqueeze(1), at]
            found[place] = _pearson(tables[0][place], *own)
        pair = _Pairs(kinds, [slice(a, a + n) for a, n in zip(starts, self._places)], tables)
        for task in range(size):
            for other in range(task + 1):
                if CLASS in (kinds[task], kinds[other]) and self._places[task] and self._places[other]:
                    found[task, other] = found[other, task] = pair.association(task, other)
        return found

    def best_constant(self) -> Tensor:
        """Return ``[T]``, the mean loss of the best constant guess: the entropy of classes, the variance of numbers."""
        kinds, _ = self._kinds[0].now()
        found = torch.full((len(kinds),), torch.nan, dtype=torch.float64)
        for task, (start, number) in enumerate(zip(_starts(self._places), self._places)):
            count = float(self.common[task, task])
            if not number or not count:
                continue
            means = self.sums[start : start + number, task].cpu() / count
            if kinds[task] == CLASS:
                found[task] = -torch.special.xlogy(means, means).sum()
            elif kinds[task] == BINARY:
                both = torch.cat([means, 1 - means])
                found[task] = -torch.special.xlogy(both, both).sum()
            else:
                found[task] = float(self.squares[start, task]) / count - float(means) ** 2
        return found

    def _columns(self, batch: LabelBatch, values: Tensor, known: Tensor, task: int) -> Tensor:
        number = self._places[task]
        if number < 2:
            return values[:, task : task + number]
        hot = torch.nn.functional.one_hot(batch.values[:, task].long().clamp(0, number - 1), number)
        return hot.to(values.dtype) * known[:, task : task + 1]

    def check_loaded(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Also take tables of another size, if all of them have it."""
        width = {
            len(one)
            for name in ("sums", "squares", "products")
            if isinstance(one := state_dict.get(prefix + name), Tensor)
        }
        if len(width) > 1:
            raise StateMismatchError("the label tables in the state dict do not fit together. Nothing was loaded.")
        before = dict(self._buffers)
        try:
            self._resize(width.pop() if width else len(self.sums))
            super().check_loaded(state_dict, prefix)
        finally:
            self._buffers.update(before)

    def _resize(self, width: int) -> None:
        tasks = len(self.common)
        for name, shape in {"sums": (width, tasks), "squares": (width, tasks), "products": (width, width)}.items():
            self._buffers[name] = self.common.new_zeros(shape)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self.check_loaded(state_dict, prefix)
        if isinstance(sums := state_dict.get(prefix + "sums"), Tensor):
            self._resize(len(sums))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._places = self._kinds[0].columns.tolist()


class _Pairs:
    """Association of two tasks of which one has classes, out of the tables."""

    def __init__(self, kinds: list[int], places: list[slice], tables: list[Tensor]) -> None:
        self._kinds, self._places = kinds, places
        self._common, self._sums, self._squares, self._products = tables

    def association(self, task: int, other: int) -> float:
        if self._kinds[task] != CLASS:
            task, other = other, task
        number = float(self._common[task, other])
        counts = self._sums[self._places[task], other]  # of the classes, among the samples in common
        both = self._products[self._places[task], self._places[other]]
        if task == other:
            both = counts.diag()
        if self._kinds[other] == CLASS:
            return _cramer(both, number)
        if self._kinds[other] == BINARY:
            return _cramer(torch.cat([both, counts.unsqueeze(1) - both], 1), number)
        total, square = (float(each[self._places[other], task]) for each in (self._sums, self._squares))
        return _epsilon(both.squeeze(1), counts, number, total, square)


def _pearson(common: Tensor, sums: Tensor, squares: Tensor, products: Tensor) -> Tensor:
    """Return ``[t, t]``, of sums ``[i, j]`` of task i over the samples in common with j."""
    count = common.clamp(min=1)
    spread = squares / count - (sums / count).square()
    # Where all labels are equal, rounding is left.
    spread = torch.where(spread > 1e-12 * (squares / count), spread, torch.nan)
    covariance = products / count - sums * sums.T / count.square()
    found = (covariance / (spread * spread.T).sqrt()).clamp(-1, 1)
    return torch.where(common >= 2, found, torch.nan)


def _cramer(table: Tensor, number: float) -> float:
    rows, columns = table.sum(1), table.sum(0)
    table = table[rows > 0][:, columns > 0]
    r, c = table.shape
    if number < 2 or r < 2 or c < 2:
        return float("nan")
    expected = table.sum(1, keepdim=True) * table.sum(0) / number
    square = float(((table - expected).square() / expected).sum()) / number
    square = max(0.0, square - (r - 1) * (c - 1) / (number - 1))
    r_less, c_less = (each - (each - 1) ** 2 / (number - 1) for each in (r, c))
    least = min(r_less, c_less) - 1
    return min(1.0, math.sqrt(square / least)) if least > 0 else float("nan")


def _epsilon(sums: Tensor, counts: Tensor, number: float, total: float, square: float) -> float:
    here = counts > 0
    classes = int(here.sum())
    whole = square - total**2 / number if number else 0.0
    if classes < 2 or number <= classes or whole <= 1e-12 * square:
        return float("nan")
    between = float((sums[here].square() / counts[here]).sum()) - total**2 / number
    left = (1 - between / whole) * (number - 1) / (number - classes)
    return math.sqrt(max(0.0, 1 - left))


def _starts(columns: list[int]) -> list[int]:
    return [sum(columns[:task]) for task in range(len(columns))]
