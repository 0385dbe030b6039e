"""Loss, margin and slope of each sample, by the kind of its task; tasks of one kind are computed together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Union

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import ConfigurationError, ShapeError, WrongTypeError
from ...tasks import per_task
from ...torch_tools import gradients_of
from .kinds import BINARY, CLASS, TaskKinds
from .labels import LabelBatch

#: ``(output, label) -> [B]``, for ``[B]`` or ``[B, K]`` and ``[B]``.
LossFunction = Callable[[Tensor, Tensor], Tensor]
#: What ``loss=`` accepts.
LossChoice = Union[LossFunction, Mapping[str, LossFunction], None]


class TaskLosses:
    """The losses of a report: of the kinds, or what the user gave."""

    def __init__(self, tasks: Sequence[str], kinds: TaskKinds, given: LossChoice) -> None:
        self._tasks = tasks
        self._kinds = kinds
        if given is None or isinstance(given, Mapping):
            self.given: dict[int, LossFunction] = per_task(given or {}, tasks, "loss")
        else:
            self.given = dict.fromkeys(range(len(tasks)), given)
        for task, function in self.given.items():
            if not callable(function):
                raise WrongTypeError(
                    f"the loss of task {tasks[task]!r} must be a function (output, label) -> [B], found {function!r}. Leave "
                    "it out for that of its kind."
                )

    def losses(self, outputs: Mapping[int, Tensor], labels: LabelBatch) -> Tensor:
        """Return ``[t, ..., B]`` for outputs ``[..., B]`` or ``[..., B, K]`` of t tasks.

        Those of missing labels mean nothing.
        """
        found: dict[int, Tensor] = {}
        for group in self._groups(outputs):
            if (function := self.given.get(group[0])) is None:
                found.update(zip(group, self._together(_losses, group, outputs, labels)))
            else:
                label, output = labels.as_given(group[0]), outputs[group[0]]
                several = output.ndim > 1 + self._has_classes(group[0])
                each = [self._checked(function, group[0], one, label) for one in (output if several else [output])]
                found[group[0]] = torch.stack(each) if several else each[0]
        return torch.stack([found[task] for task in outputs])

    def slopes(self, outputs: Mapping[int, Tensor], labels: LabelBatch, known: Tensor) -> dict[int, Tensor]:
        """Return derivatives of the samples' losses by the outputs, of their shapes; 0 where not ``known`` ``[t, B]``."""
        found: dict[int, Tensor] = {}
        for group in self._groups(outputs):
            if (function := self.given.get(group[0])) is None:
                found.update(zip(group, self._together(_slopes, group, outputs, labels)))
            else:
                found[group[0]] = self._given_slopes(function, group[0], outputs[group[0]], labels)
        for row, task in enumerate(outputs):
            here = known[row].unsqueeze(-1) if self._has_classes(task) else known[row]
            found[task] = found[task].masked_fill(~here, 0)
        return {task: found[task] for task in outputs}

    def margins(self, outputs: Mapping[int, Tensor], labels: LabelBatch) -> Tensor:
        """Return ``[t, B]``: ``|y - p|`` of a probability, ``|y - o|`` of a number, ``1 - p`` of the label's class."""
        found: dict[int, Tensor] = {}
        for group in self._groups(outputs, alike=True):
            found.update(zip(group, self._together(_margins, group, outputs, labels)))
        return torch.stack([found[task] for task in outputs])

    def _groups(self, outputs: Mapping[int, Tensor], *, alike: bool = False) -> list[list[int]]:
        """Return tasks that can be stacked; one with a loss of its own is alone, unless they are ``alike`` in that."""
        kinds, widths = self._kinds.now()
        groups: dict[tuple[int, int, int], list[int]] = {}
        for task in outputs:
            own = -1 if alike or task not in self.given else task
            groups.setdefault((kinds[task], widths[task], own), []).append(task)
        return list(groups.values())

    def _together(
        self,
        function: Callable[[int, Tensor, Tensor], Tensor],
        group: Sequence[int],
        outputs: Mapping[int, Tensor],
        labels: LabelBatch,
    ) -> Sequence[Tensor]:
        stacked = torch.stack([outputs[task] for task in group])
        values = labels.values[:, list(group)].T if len(group) < labels.values.shape[1] else labels.values.T
        samples = stacked.shape[: stacked.ndim - self._has_classes(group[0])]
        values = values.view(len(group), *[1] * (len(samples) - 2), -1).expand(samples)
        return function(self._kinds.now()[0][group[0]], stacked, values.to(stacked.dtype)).unbind(0)

    def _has_classes(self, task: int) -> bool:
        return self._kinds.now()[1][task] > 1

    def _given_slopes(self, function: LossFunction, task: int, output: Tensor, labels: LabelBatch) -> Tensor:
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            losses = self._checked(function, task, leaf, labels.as_given(task))
            if not losses.requires_grad:
                raise ConfigurationError(
                    f"the loss of task {self._tasks[task]!r} does not depend on the output. Use operations of torch on it."
                )
            # A missing label has the value 0, and its sample no part.
            kept = losses.masked_fill(~labels.known[:, task], 0).sum()
        (slope,) = gradients_of([kept], [leaf])
        return torch.zeros_like(output) if slope is None else slope

    def _checked(self, function: LossFunction, task: int, output: Tensor, label: Tensor) -> Tensor:
        found = function(output, label.to(output.dtype) if label.is_floating_point() else label)
        if not isinstance(found, Tensor) or found.shape != label.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(
                f"the loss of task {self._tasks[task]!r} returned {shape}, expected one number for each sample, "
                f"{list(label.shape)}. Use reduction='none'."
            )
        return found


def _losses(kind: int, outputs: Tensor, labels: Tensor) -> Tensor:
    if kind == BINARY:
        return functional.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    if kind == CLASS:
        return -_at_label(outputs.log_softmax(-1), labels)
    return (outputs - labels).square()


def _slopes(kind: int, outputs: Tensor, labels: Tensor) -> Tensor:
    if kind == BINARY:
        return outputs.sigmoid() - labels
    if kind == CLASS:
        return outputs.softmax(-1) - functional.one_hot(labels.long(), outputs.shape[-1]).to(outputs)
    return 2 * (outputs - labels)


def _margins(kind: int, outputs: Tensor, labels: Tensor) -> Tensor:
    if kind == BINARY:
        return (labels - outputs.sigmoid()).abs()
    if kind == CLASS:
        return 1 - _at_label(outputs.softmax(-1), labels)
    return (labels - outputs).abs()


def _at_label(scores: Tensor, labels: Tensor) -> Tensor:
    return scores.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
