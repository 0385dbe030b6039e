"""Test scores of a training as a table."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..runtime.tables import aligned
from ..training.metrics import METRICS_OF, TITLES
from ..training.train import Outcome

_NMSE = "nMSE: mean squared error / variance of the training labels (lower is better)."


def score_rows(outcome: Outcome) -> list[list[str]]:
    """A head, a row for each task with its number of test labels, and the means over the tasks."""
    names = [
        name for name in dict.fromkeys(name for own in METRICS_OF.values() for name in own) if name in outcome.macro
    ]

    def cells(own: Mapping[str, float]) -> list[str]:
        return [f"{own[name]:.4f}" if name in own and own[name] == own[name] else "-" for name in names]

    known = (~torch.isnan(outcome.outputs["labels"])).sum(0).tolist()
    rows = [["task", "labels", *(TITLES.get(name, name) for name in names)]]
    rows += [[task, str(count), *cells(own)] for (task, own), count in zip(outcome.scores.items(), known)]
    return [*rows, ["mean over the tasks", "", *cells(outcome.macro)]]


def score_text(outcome: Outcome) -> str:
    """How the weights were chosen, and the table, for the terminal."""
    if outcome.validation > -torch.inf:
        chosen = f"Best weights by validation: epoch {outcome.best_epoch}. Test:"
    elif outcome.best_epoch:
        chosen = (
            "No epoch had a validation score, since no task has validation labels of two kinds. The model keeps the weights "
            f"of the lowest validation loss: epoch {outcome.best_epoch}. Test:"
        )
    else:
        chosen = (
            "The model keeps its first weights: no epoch had a validation score, since outputs were not finite. Use a "
            "smaller --learning-rate. Test:"
        )
    notes = ["", _NMSE] if "nmse" in outcome.macro else []
    return "\n".join([chosen, aligned(score_rows(outcome), left=1), *notes])


def score_markdown(outcome: Outcome) -> str:
    """The table for a model card."""
    head, *rows = score_rows(outcome)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    notes = ["", _NMSE] if "nmse" in outcome.macro else []
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), *notes])
