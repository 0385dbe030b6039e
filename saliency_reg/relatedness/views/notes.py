"""What has to be said beside views: chance level, and pairs of which nothing is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...tasks import first_few

#: Views that are of the labels alone, whatever the model has learned.
_OF_LABELS = ("label_correlation",)


def tasks_at_chance(tasks: Sequence[str], skill: Tensor | None) -> tuple[str, ...]:
    """Return the tasks that are predicted no better than by the best constant guess, as far as known."""
    if skill is None:
        return ()
    return tuple(task for task, own in zip(tasks, skill.tolist()) if own <= 0)


def note_on_chance(tasks: Sequence[str], skill: Tensor | None) -> str | None:
    """Return one sentence if tasks are at chance level."""
    found = tasks_at_chance(tasks, skill)
    if not found or skill is None:
        return None
    known = int((~skill.isnan()).sum())
    if len(found) == known:
        return "The model is at chance level: it predicts no task better than a constant guess."
    return f"At chance level, no better than a constant guess: {first_few(found)} ({len(found)} of {known} tasks)."


def notes_on(
    tasks: Sequence[str], matrices: Mapping[str, Tensor], common_labels: Tensor, skill: Tensor | None
) -> tuple[str, ...]:
    """Return what a reader must know before believing the views, one sentence each."""
    notes = []
    if (chance := note_on_chance(tasks, skill)) is not None:
        read = "labels alone tell more" if any(key in matrices for key in _OF_LABELS) else "train longer first"
        notes.append(f"{chance} What the model shows of these tasks is mostly noise: {read}.")
    off = ~torch.eye(len(tasks), dtype=torch.bool)
    if silent := [task for task, own in zip(tasks, common_labels.diagonal().tolist()) if own == 0]:
        notes.append(f"No label was seen of {first_few(silent)}.")
    apart = ((common_labels == 0) & off).triu().nonzero().tolist()
    named = [f"{tasks[i]} and {tasks[j]}" for i, j in apart if not {tasks[i], tasks[j]} & {*silent}]
    if named:
        pairs = "1 pair was" if len(named) == 1 else f"{len(named)} pairs were"
        notes.append(f"{pairs} never seen together in one sample: {first_few(named, 3)}.")
    for key, matrix in matrices.items():
        empty = (matrix.isnan() | ~off).all(1)
        if unknown := [task for task, own in zip(tasks, empty.tolist()) if own and task not in silent]:
            notes.append(f"{key} knows nothing of {first_few(unknown)}.")
    return tuple(notes)
