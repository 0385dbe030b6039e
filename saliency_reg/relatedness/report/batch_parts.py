"""What one batch adds to the report: sums over its samples, which are added up over the processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...capture import CapturedForward
from ...errors import ShapeError
from .fork_gradients import ForkGradients, ForkReader
from .kinds import TaskKinds
from .label_tables import LabelTables
from .labels import LabelBatch
from .layout import OutputLayout
from .running import RunningSums
from .task_losses import TaskLosses

#: Names of what is ``[T]`` and ``[T, T]``; ``unusable`` counts samples whose output is not finite.
_OF_TASKS = ("margins", "losses", "labelled", "unusable")
_OF_PAIRS = ("both_hard", "both_easy", "one_hard", "gramian", "distances", "distance_samples")
_TABLES = ("common", "sums", "squares", "products")
#: Processes with an error, and those without heads.
_FLAGS = ("errors", "without_heads")


class BatchParts:
    """Sums of one batch by name, all of them zeros at first, and what is needed for a look ahead."""

    def __init__(self, tables: LabelTables, tasks: int, device: torch.device) -> None:
        self.tasks = tasks
        like = tables.common
        self.sums: dict[str, Tensor] = {name: like.new_zeros(tasks) for name in _OF_TASKS}
        self.sums |= {name: like.new_zeros(tasks, tasks) for name in _OF_PAIRS}
        self.sums |= {name: torch.zeros_like(tables.get_buffer(name)) for name in _TABLES}
        self.sums |= {name: like.new_zeros(()) for name in (*_FLAGS, "size")}
        self.device = device
        self.gradients: ForkGradients | None = None
        self.outputs: dict[int, Tensor] = {}
        self.known = torch.zeros(0, 0, dtype=torch.bool, device=device)

    def joined(self) -> Tensor:
        """Return all sums in one row."""
        return torch.cat([part.flatten() for part in self.sums.values()])

    def part_again(self, joined: Tensor) -> None:
        """Take them out of such a row."""
        parts = torch.split(joined, [part.numel() for part in self.sums.values()])
        self.sums = {name: part.view_as(own) for (name, own), part in zip(self.sums.items(), parts)}

    def add_labels(self, tables: LabelTables, batch: LabelBatch) -> None:
        self.sums.update(zip(_TABLES, tables.of_batch(batch)))

    def add_outputs(
        self,
        outputs: Mapping[int, Tensor],
        batch: LabelBatch,
        losses: TaskLosses,
        running: RunningSums,
    ) -> None:
        """Add losses, margins and which samples are hard, of the settled tasks whose heads ran."""
        self.outputs = dict(outputs)
        if not outputs:
            return
        present = list(outputs)
        finite = torch.stack([output.view(len(output), -1).isfinite().all(1) for output in outputs.values()])
        known = batch.known[:, present].T
        self.known = known & finite
        sums, kind = self.sums, running.thresholds().dtype
        sums["unusable"][present] = (known & ~finite).sum(1).to(kind)
        sums["labelled"][present] = self.known.sum(1).to(kind)
        sums["losses"][present] = losses.losses(outputs, batch).masked_fill(~self.known, 0).sum(1, dtype=kind)
        margins = losses.margins(outputs, batch)
        sums["margins"][present] = margins.masked_fill(~self.known, 0).sum(1, dtype=kind)
        # As of before this batch; where there was none, nothing is told.
        thresholds = running.thresholds()[present].unsqueeze(1)
        judged = self.known & ~thresholds.isnan()
        hard = torch.zeros(self.tasks, judged.shape[1], dtype=kind, device=self.device)
        easy = torch.zeros_like(hard)
        is_hard = margins.to(kind) >= thresholds
        hard[present], easy[present] = (judged & is_hard).to(kind), (judged & ~is_hard).to(kind)
        sums["both_hard"], sums["both_easy"], sums["one_hard"] = hard @ hard.T, easy @ easy.T, hard @ easy.T

    def add_gradients(
        self,
        forward: CapturedForward,
        layout: OutputLayout,
        reader: ForkReader,
        losses: TaskLosses,
        batch: LabelBatch,
        all_outputs: Mapping[int, Tensor],
    ) -> None:
        """Add inner products of the task gradients at the feature map, and its squared length."""
        slopes = {task: torch.zeros_like(output) for task, output in all_outputs.items()}
        if self.outputs:
            slopes |= losses.slopes(self.outputs, batch, self.known)
        self.gradients = reader.read(forward, layout, slopes)
        self.sums["gramian"] = self.gradients.gramian().to(self.sums["gramian"])
        self.sums["size"] = self.gradients.size().to(self.sums["size"])

    def losses_after(self, steps: Tensor, losses: TaskLosses, batch: LabelBatch) -> Tensor:
        """Return ``[T, 1 + T]``, summed losses as they are and after a step along the gradient of each task."""
        found = self.sums["gramian"].new_zeros(self.tasks, 1 + self.tasks)
        if self.gradients is None or not self.outputs:
            return found
        after = self.gradients.outputs_after(steps)
        outputs = {task: after[task] for task in self.outputs if task in after}
        rows = torch.tensor([task in after for task in self.outputs], device=self.known.device)
        if outputs:
            each = losses.losses(outputs, batch).masked_fill(~self.known[rows].unsqueeze(1), 0)
            found[list(outputs)] = each.sum(2, dtype=found.dtype)
        found[[task for task in self.outputs if task not in after]] = torch.nan
        return found


def checked_sizes(outputs: Mapping[int, Tensor], tasks: Sequence[str], size: int) -> None:
    if wrong := {tasks[task]: len(output) for task, output in outputs.items() if len(output) != size}:
        raise ShapeError(
            f"the feature map has {size} samples, and the outputs have {dict(list(wrong.items())[:6])}. A report needs one "
            "output for each sample of the batch."
        )


def cosines_of(gramian: Tensor) -> Tensor:
    """Return ``[T, T]``; NaN for a task without a gradient."""
    length = gramian.diagonal().clamp(min=0).sqrt()
    length = torch.where(length > 0, length, torch.nan)
    cosines = (gramian / length / length.unsqueeze(1)).clamp(-1, 1)
    itself = torch.eye(len(gramian), dtype=torch.bool, device=gramian.device) & cosines.isfinite()
    return torch.where(itself, 1.0, cosines)


def widths_of(outputs: Mapping[int, Tensor]) -> dict[int, int]:
    return {task: 1 if output.ndim == 1 else output.shape[1] for task, output in outputs.items()}


def settled(outputs: Mapping[int, Tensor], kinds: TaskKinds, tasks: Sequence[str]) -> dict[int, Tensor]:
    """Return the outputs of tasks whose kind is known."""
    found, known = {}, kinds.now()
    for task, output in outputs.items():
        if not known[0][task]:
            continue
        width = 1 if output.ndim == 1 else output.shape[1]
        if width != known[1][task]:
            raise ShapeError(
                f"task {tasks[task]!r} had {known[1][task]} output(s) for each sample before, and has {width} now."
            )
        found[task] = output
    return found
