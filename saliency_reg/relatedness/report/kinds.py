"""What kind of task each one is: told by the user, or by its outputs and the labels in the first batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...distributed import Ranks
from ...errors import ConfigurationError, NonFiniteError, ShapeError
from ...tasks import per_task
from ...torch_tools import StateModule, check_choice, real_device, state_dtype, warn_user
from .labels import LabelBatch

BINARY, NUMBER, CLASS = 1, 2, 3
KINDS = {"binary": BINARY, "number": NUMBER, "class": CLASS}
#: Classes of a task, and columns of all tasks, up to which association of labels is counted.
MOST_CLASSES, MOST_COLUMNS = 256, 2048


class TaskKinds(StateModule):
    """Kinds and widths of the outputs, ``[T]``; 0 where a task was not seen yet. The same in all processes.

    ``columns`` are those of the label tables, ``shifts`` what is taken off numbers there, so that no digits are lost.
    """

    any_values: ClassVar[tuple[str, ...]] = ("shifts",)
    kinds: Tensor
    widths: Tensor
    columns: Tensor
    shifts: Tensor

    def __init__(self, tasks: Sequence[str], given: Mapping[str, str] | Sequence[str] | str | None) -> None:
        super().__init__()
        self._tasks = tuple(tasks)
        given = {} if given is None else dict.fromkeys(tasks, given) if isinstance(given, str) else given
        self._given = per_task(given, tasks, "kinds")
        for kind in self._given.values():
            check_choice("kind", kind, tuple(KINDS))
        for name in ("kinds", "widths", "columns"):
            self.register_buffer(name, torch.zeros(len(tasks), dtype=torch.int64, device=real_device()))
        device = real_device()
        self.register_buffer("shifts", torch.zeros(len(tasks), dtype=state_dtype(device), device=device))
        self._known: tuple[Tensor, list[int], list[int]] | None = None

    def now(self) -> tuple[list[int], list[int]]:
        """Return kinds and widths as numbers; a device is waited for when they changed."""
        known = self._known
        if known is None or known[0] is not self.kinds or known[0]._version != self._version_read:
            self._known = known = self.kinds, self.kinds.tolist(), self.widths.tolist()
            self._version_read = self.kinds._version
        return known[1], known[2]

    def settle(self, batch: LabelBatch, widths: Mapping[int, int], ranks: Ranks) -> bool:
        """Decide for tasks that now have labels and outputs; return whether there were any. All processes come here."""
        kinds = self.now()[0]
        if all(kinds):
            return False
        found = ranks.add(self._seen(batch, widths)).tolist()
        decided: list[tuple[int, int, int, float, int]] = []
        columns = int(self.columns.sum())
        for task, (ran, width, labelled, other, total, minus) in enumerate(zip(*found)):
            if kinds[task] or not (ran and labelled):
                continue
            if width % ran:
                raise ShapeError(f"the processes have different numbers of outputs for task {self._tasks[task]!r}.")
            kind = self._kind_of(task, int(width / ran), other, minus)
            own = self._columns_of(task, kind, int(width / ran), columns)
            columns += own
            decided.append((task, kind, int(width / ran), total / labelled if kind == NUMBER else 0.0, own))
        for task, kind, outputs, shift, own in decided:  # of all, or of none
            self.kinds[task], self.widths[task], self.shifts[task], self.columns[task] = kind, outputs, shift, own
        return bool(decided)

    def check(self, batch: LabelBatch, *, waits: bool) -> None:
        """Refuse labels that a task of its kind cannot have; negative classes mean that there is none.

        Without ``waits`` (for a device), such labels are left out, and refused by the next check that waits.
        """
        values, known = batch.values, batch.known
        of_kind = torch.tensor(self.now()[0], device=values.device)
        widths = torch.tensor(self.now()[1], device=values.device)
        classes = of_kind == CLASS
        known &= ~(classes & (values < 0))
        bad = (of_kind == BINARY) & (values != 0) & (values != 1)
        bad |= classes & ((values != values.round()) | (values >= widths))
        bad = (bad | values.isinf()) & known
        if not waits:
            known &= ~bad
            before = self._bad_before
            self._bad_before = bad.any(0) if before is None else bad.any(0) | before.to(bad.device)
        elif bool(bad.any()):
            row, task = (int(each) for each in bad.nonzero()[0])
            self._refuse(task, f"{float(values[row, task]):g}")
        elif self._bad_before is not None:
            found, self._bad_before = self._bad_before.nonzero().flatten().tolist(), None
            if found:
                self._refuse(found[0], "of an earlier batch")
        values.masked_fill_(~known, 0)

    def _refuse(self, task: int, label: str) -> None:
        name, kind, width = self._tasks[task], self.now()[0][task], self.now()[1][task]
        if "inf" in label or kind == NUMBER:
            raise NonFiniteError(f"a label of task {name!r} is infinite. Use NaN where a label is missing.")
        if kind == BINARY:
            raise ConfigurationError(
                f"task {name!r} was taken for a binary one, by labels of 0 and 1, and now has another label, {label}. For "
                f"numbers pass kinds={{{name!r}: 'number'}} to relation_report; use NaN (or -100 among whole numbers) where "
                "a label is missing."
            )
        raise ShapeError(
            f"task {name!r} has {width} classes, 0 to {width - 1}, by its outputs, and a label that is none of them, "
            f"{label}. Use whole numbers, and NaN or a negative number where a label is missing."
        )

    def _seen(self, batch: LabelBatch, widths: Mapping[int, int]) -> Tensor:
        """Return ``[6, T]``: heads that ran here, their outputs, labels, those that are not 0 or 1, their sum, and -1s."""
        known, values = batch.known & batch.values.isfinite(), batch.values
        other = known & (values != 0) & (values != 1)
        whole = torch.tensor([dtype is not None and not dtype.is_floating_point for dtype in batch.dtypes])
        minus = other & (values == -1) & whole.to(values.device)
        ran = torch.zeros(2, len(self._tasks))
        for task, width in widths.items():
            ran[:, task] = torch.tensor([1, width])
        counts = torch.stack([known.sum(0), other.sum(0), (values * known).nan_to_num().sum(0), minus.sum(0)])
        return torch.cat([ran.to(self.shifts), counts.to(self.shifts)])

    def _kind_of(self, task: int, width: int, other: float, minus: float) -> int:
        name, given = self._tasks[task], self._given.get(task)
        if given is None and width == 1 and other and other == minus:
            raise ConfigurationError(
                f"the labels of task {name!r} are whole numbers, with -1 beside 0 or 1. Pass labels of 0 and 1, with -100 "
                f"(or NaN) where one is missing, or say kinds={{{name!r}: 'number'}}."
            )
        kind = KINDS[given] if given else CLASS if width > 1 else NUMBER if other else BINARY
        if (kind == CLASS) != (width > 1):
            raise ConfigurationError(
                f"task {name!r} is of the kind {given!r}, but its head has {width} output(s) for each sample: 'class' needs "
                "one for each class, 'binary' and 'number' one. Choose another kind, or give each number a task."
            )
        return kind

    def _columns_of(self, task: int, kind: int, width: int, so_far: int) -> int:
        if width > MOST_CLASSES or width + so_far > MOST_COLUMNS:
            warn_user(
                f"task {self._tasks[task]!r} has {width} outputs: of more than {MOST_CLASSES} classes, or {MOST_COLUMNS} "
                "columns together, the association of labels is not counted, and NaN in label_correlation."
            )
            return 0
        return width if kind == CLASS else 1

    _version_read = -1
    _bad_before: Tensor | None = None  # tasks with labels that were not waited for
