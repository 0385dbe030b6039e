"""Test scores of a training on images as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..runtime.tables import aligned
from ..training.metrics import METRICS_OF, TITLES

_NMSE = "nMSE: mean squared error / variance of the training labels (lower is better)."


def score_text(found: Mapping[str, Any]) -> str:
    """How the weights were chosen, and the scores, for the terminal.

    Args:
        found: figures of the training: those of an ``Outcome``, with ``best_epoch`` and ``test_labels``.
    """
    if found["validation"] > -math.inf:
        chosen = f"Best weights by validation: epoch {found['best_epoch']}. Test:"
    elif found["best_epoch"]:
        chosen = (
            "No epoch had a validation score, since no task has validation labels of two kinds. The model keeps the weights "
            f"of the lowest validation loss: epoch {found['best_epoch']}. Test:"
        )
    else:
        chosen = (
            "The model keeps its first weights: no epoch had a validation score, since outputs were not finite. Use a "
            "smaller --learning-rate. Test:"
        )
    return "\n".join([chosen, aligned(_rows(found), left=1), *_notes(found)])


def score_markdown(found: Mapping[str, Any]) -> str:
    """The scores for a model card."""
    head, *rows = _rows(found)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), *_notes(found)])


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    names = [
        name for name in dict.fromkeys(name for own in METRICS_OF.values() for name in own) if name in found["macro"]
    ]

    def cells(own: Mapping[str, float]) -> list[str]:
        return [f"{own[name]:.4f}" if name in own and own[name] == own[name] else "-" for name in names]

    rows = [["task", "labels", *(TITLES.get(name, name) for name in names)]]
    rows += [[task, str(found["test_labels"][task]), *cells(own)] for task, own in found["scores"].items()]
    return [*rows, ["mean over the tasks", "", *cells(found["macro"])]]


def _notes(found: Mapping[str, Any]) -> list[str]:
    return ["", _NMSE] if "nmse" in found["macro"] else []
