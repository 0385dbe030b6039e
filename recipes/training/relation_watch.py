"""What a training shows of the relations between its tasks, kept from before it knew its samples by heart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saliency_reg import RelationViews, SaliencyRegularizer, relation_report

from ..data.task_kinds import TaskKind

_KINDS = {"binary": "binary", "classes": "class", "number": "number"}


class RelationWatch:
    """Gathers the five views from the batches of a training, and keeps those of the look with the least validation loss.

    Views are running means over the latest hundred steps or so. On samples that a model knows by heart all tasks are easy,
    which says nothing of what they have in common: from the least validation loss on, later steps are left out.

    Args:
        regularizer: whose hooks are used, attached to the model.
        kinds: of the tasks.
    """

    def __init__(self, regularizer: SaliencyRegularizer, kinds: Mapping[str, TaskKind]) -> None:
        self._report = relation_report(
            regularizer, kinds={task: _KINDS[kind.name] for task, kind in kinds.items()}, tag_every=2, points=0
        )
        numbers = [(kind.mean, kind.spread) if kind.name == "number" else (0.0, 1.0) for kind in kinds.values()]
        self._mean, self._spread = torch.tensor(numbers, dtype=torch.float64).unbind(1)
        self._least = math.inf
        self.views: RelationViews | None = None

    def take(self, labels: Tensor) -> None:
        """Take up the latest forward, with its labels ``[b, T]``, before its backward pass."""
        # Models predict numbers in units of their spread.
        known = (labels.double() - self._mean.to(labels.device)) / self._spread.to(labels.device)
        self._report.update(known.float())

    def after_look(self, validation_loss: float) -> None:
        """Keep the views of now, if the mean validation loss has never been less."""
        if self.views is None or validation_loss < self._least:
            self.views = self._report.views()
            self._least = validation_loss if math.isfinite(validation_loss) else math.inf

    def state_dict(self) -> dict[str, Any]:
        views = self.views
        kept = None
        if views is not None:
            kept = {
                "tasks": list(views.tasks),
                "matrices": dict(views.matrices),
                "common_labels": views.common_labels,
                "skill": views.skill,
            }
        return {"report": self._report.state_dict(), "least": self._least, "views": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._report.load_state_dict(state["report"])
        self._least = state["least"]
        self.views = None if state["views"] is None else RelationViews(**state["views"])

    def remove(self) -> None:
        """Look at the model no longer."""
        self._report.remove()
