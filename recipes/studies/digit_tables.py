"""Tables of results, as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runtime.tables import aligned
from ..training.digit_metrics import METRICS

__all__ = ["difference_table", "result_table", "tuning_table"]

_TITLES = {"accuracy": "accuracy %", "auc": "AUC %", "precision": "precision %", "recall": "recall %"}


def tuning_table(methods: Mapping[str, Any]) -> str:
    """The validation AUC of every trial, and what was chosen."""
    rows = [["", "parameter", "chosen", "validation AUC % of each value tried"]]
    for method in methods.values():
        tuning = method["tuning"]
        trials = "   ".join(f"{trial['value']:g}: {100 * trial['validation_auc']:.2f}" for trial in tuning["trials"])
        chosen = "-" if tuning["chosen"] is None else f"{tuning['chosen']:g}"
        rows.append([method["label"], tuning["parameter"], chosen, trials or "-"])
    return aligned(rows, left=4)


def result_table(methods: Mapping[str, Any]) -> str:
    """Mean and standard deviation over the seeds, in percent."""
    rows = [["", "seeds", *_TITLES.values()]]
    for method in methods.values():
        summary = method["summary"]
        cells = ["-" if summary is None else _percent(summary[name]) for name in METRICS]
        rows.append([method["label"], str(len(method["per_seed"])), *cells])
    return aligned(rows, left=1)


def difference_table(methods: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    """Mean and standard deviation over the seeds of the difference within a seed, in percentage points."""
    rows = [["", "seeds", *(title.replace(" %", "") for title in _TITLES.values())]]
    for key, difference in differences.items():
        cells = [_percent(difference["summary"][name], sign="+") for name in METRICS]
        rows.append([methods[key]["label"], str(len(difference["seeds"])), *cells])
    return aligned(rows, left=1)


def _percent(statistic: Mapping[str, float | None], sign: str = "") -> str:
    mean, deviation = statistic["mean"], statistic["std"]
    if mean is None:
        return "-"
    text = f"{100 * mean:{sign}.2f}"
    return text if deviation is None else f"{text} +- {100 * deviation:.2f}"
