"""Tables of a study, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..methods.methods import BASELINE, METHODS
from .study import Setting, Study

__all__ = ["markdown"]

_TITLES = {
    "accuracy": "accuracy %",
    "auc": "AUC %",
    "precision": "precision %",
    "recall": "recall %",
    "nmse": "nMSE (lower is better)",
    "f1": "F1 %",
    "f1_rare": "F1 of rare tasks %",
    "auc_rare": "AUC of rare tasks %",
}
_PERCENT = ("accuracy", "auc", "precision", "recall", "f1", "f1_rare", "auc_rare")


def markdown(study: Study, metrics: Sequence[str], compared: Sequence[str]) -> str:
    """One table for each setting, with what is not done yet.

    Args:
        study: its results.
        metrics: columns of means over seeds.
        compared: columns of paired differences to hard sharing.
    """
    return "\n\n".join(_table(study, setting, metrics, compared) for setting in study.settings)


def _table(study: Study, setting: Setting, metrics: Sequence[str], compared: Sequence[str]) -> str:
    titles = [
        "method",
        "tuned",
        "seeds",
        *(_TITLES[name] for name in metrics),
        *(f"difference in {_TITLES[name].removesuffix(' %').partition(' (')[0]}" for name in compared),
    ]
    rows = [_row(study, setting, key, metrics, compared) for key in setting.methods]
    lines = [titles, ["---"] * len(titles), *rows]
    return f"### {setting.label}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(study: Study, setting: Setting, key: str, metrics: Sequence[str], compared: Sequence[str]) -> list[str]:
    method = METHODS[key]
    value = study.chosen(setting, method)
    summary = study.summary(setting, method, metrics)
    difference = {} if key == BASELINE else study.difference(setting, method, compared)
    done = len(study.reported(setting, method))
    parameter = method.parameter.partition(",")[0]
    return [
        method.label,
        "not done" if value is None else f"{parameter} {value:g}",
        f"{done}" if done == len(study.seeds) else f"{done} of {len(study.seeds)}",
        *(_text(name, summary.get(name)) for name in metrics),
        *(_text(name, difference.get(name), sign="+") for name in compared),
    ]


def _text(name: str, statistic: tuple[float, float] | None, sign: str = "") -> str:
    if statistic is None or math.isnan(statistic[0]):
        return "-"
    factor, digits = (100, 2) if name in _PERCENT else (1, 4)
    mean, deviation = statistic
    text = f"{factor * mean:{sign}.{digits}f}"
    return text if math.isnan(deviation) else f"{text} +- {factor * deviation:.{digits}f}"
