"""A study as tables, for people (Markdown) and for programs (CSV), and as plain numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..methods.methods import Method
from .study import Setting, Statistic, Study

_TITLES = {
    "score": "score (mean of AUC, accuracy, 1 - nMSE) %",
    "accuracy": "accuracy %",
    "auc": "AUC %",
    "precision": "precision %",
    "recall": "recall %",
    "nmse": "nMSE (lower is better)",
    "rmse": "RMSE (lower is better)",
    "error_inside": "error of weights in span",
    "error_outside": "error outside",
    "f1": "F1 %",
    "macro_f1": "macro F1 %",
    "pearson": "Pearson correlation",
    "f1_rare": "F1 of rare tasks %",
    "auc_learnable": "AUC of tasks with both labels in training %",
    "auc_rare": "AUC of rare tasks %",
    "pairs": "AUC of pairs %",
    "kept": "weight on pairs of one kind %",
}


LEGEND = (
    "Mean +- standard deviation over the seeds. Differences are to the baseline with the same seed; in brackets the 95 % "
    "interval of their mean, by bootstrap over the seeds. It is somewhat too narrow for few seeds: about "
    "85 % with 5, 91 % with 10."
)


def column_title(metric: str) -> str:
    """The title of the column of a metric."""
    return _TITLES[metric]


def title_of(metric: str) -> str:
    """The title of a column, without the unit."""
    return _TITLES[metric].removesuffix(" %").partition(" (")[0]


def in_percent(metric: str) -> bool:
    """Whether people read a metric in per cent."""
    return _TITLES[metric].endswith("%")


def lower_is_better(metric: str) -> bool:
    """Whether a metric is an error."""
    return "lower is better" in _TITLES[metric] or _TITLES[metric].startswith("error")


def markdown(study: Study, metrics: Sequence[str], compared: Sequence[str]) -> str:
    """Lay out one table for each setting, with what is not done yet.

    Args:
        study: its results.
        metrics: columns of means over seeds.
        compared: columns of paired differences to the baseline.
    """
    tables = [
        f"### {setting.label}\n\n{markdown_table(rows_of(study, setting, metrics, compared))}"
        for setting in study.settings
    ]
    return "\n\n".join(tables)


def rows_of(study: Study, setting: Setting, metrics: Sequence[str], compared: Sequence[str]) -> list[list[str]]:
    """The table of a setting: titles, and a row for each method. Metrics that only other settings have are left out."""
    results = [result for method in study.methods_of(setting) for result in study.reported(setting, method).values()]
    if known := {name for result in results for name in result["macro"]}:
        metrics, compared = ([name for name in names if name in known] for names in (metrics, compared))
    differences = compared if study.baseline in setting.methods else ()
    titles = [
        "method",
        "tuned",
        "seeds",
        *(_TITLES[name] for name in metrics),
        *(f"difference in {title_of(name)}" for name in differences),
    ]
    return [titles, *(_row(study, setting, method, metrics, differences) for method in study.methods_of(setting))]


def tuning(study: Study) -> str:
    """Lay out the mean validation score of every value that was tried."""
    tables = []
    for setting in study.settings:
        rows = [["method", "tuned", "chosen", "mean validation score of each value"]]
        for method in study.methods_of(setting):
            found = ", ".join(f"{value_text(value)}: {score:.4f}" for value, score in study.tuning(setting, method))
            chosen = study.chosen(setting, method)
            rows.append(
                [
                    method.label,
                    setting.parameter(method),
                    "not done" if chosen is None else value_text(chosen),
                    found or "-",
                ]
            )
        tables.append(f"### Tuning: {setting.label}\n\n{markdown_table(rows)}")
    return "\n\n".join(tables)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of which the first has the titles."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_csv(
    study: Study,
    metrics: Sequence[str],
    further: Callable[[Setting, Method, str], Mapping[str, float | None]] | None = None,
) -> str:
    """One line for each setting, method and metric, with numbers as they are.

    Args:
        study: its results.
        metrics: that have lines.
        further: columns behind the others, the same for all lines.
    """
    names = [entry.name for entry in dataclasses.fields(Statistic)]
    titles = ["setting", "method", "tuned", "seeds", "metric", *names, *(f"difference_{name}" for name in names)]
    lines: list[list[Any]] = []
    for setting in study.settings:
        for method in study.methods_of(setting):
            summary = study.summary(setting, method, metrics)
            difference = study.difference(setting, method, metrics)
            value, seeds = study.chosen(setting, method), len(study.reported(setting, method))
            for name in summary:
                cells = [*_numbers(summary.get(name)), *_numbers(difference.get(name))]
                more = {} if further is None else further(setting, method, name)
                chosen = "" if value is None else value_text(value)
                lines.append([setting.key, method.key, chosen, seeds, name, *cells, *map(_as_it_is, more.values())])
                titles += [title for title in more if title not in titles]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([titles, *lines])
    return text.getvalue()


def as_numbers(
    study: Study,
    metrics: Sequence[str],
    further: Callable[[Setting, Method], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What is known so far, for ``results.json``; with ``further`` figures of each method."""
    return {
        "seeds": study.seeds,
        "tuning_seeds": study.tuning_seeds,
        "baseline": study.baseline,
        "settings": {
            setting.key: {
                "label": setting.label,
                "values": dict(setting.values),
                "methods": {
                    method.key: {
                        **_method(study, setting, method, metrics),
                        **({} if further is None else further(setting, method)),
                    }
                    for method in study.methods_of(setting)
                },
            }
            for setting in study.settings
        },
    }


def _method(study: Study, setting: Setting, method: Method, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "label": method.label,
        "parameter": setting.parameter(method),
        "chosen": study.chosen(setting, method),
        "trials": [{"value": value, "validation": score} for value, score in study.tuning(setting, method)],
        "per_seed": [{"seed": seed, **result} for seed, result in study.reported(setting, method).items()],
        "summary": _plain(study.summary(setting, method, metrics)),
        "difference": _plain(study.difference(setting, method, metrics)),
    }


def _plain(statistics: Mapping[str, Statistic]) -> dict[str, Any]:
    return {name: dataclasses.asdict(statistic) for name, statistic in statistics.items()}


def _numbers(statistic: Statistic | None) -> list[str]:
    if statistic is None:
        return [""] * len(dataclasses.fields(Statistic))
    return list(map(_as_it_is, dataclasses.astuple(statistic)))


def _as_it_is(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(value)


def _row(study: Study, setting: Setting, method: Method, metrics: Sequence[str], compared: Sequence[str]) -> list[str]:
    value = study.chosen(setting, method)
    summary = study.summary(setting, method, metrics)
    difference = study.difference(setting, method, compared)
    done = len(study.reported(setting, method))
    name = setting.parameter(method).partition(",")[0]
    return [
        method.label,
        "not done" if value is None else f"{name} {value_text(value)}".strip(),
        f"{done}" if done == len(study.seeds) else f"{done} of {len(study.seeds)}",
        *(statistic_text(name, summary.get(name)) for name in metrics),
        *(statistic_text(name, difference.get(name), sign="+") for name in compared),
    ]


def value_text(value: Any) -> str:
    """A value of what is tuned, or several by name."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {own:g}" for name, own in value.items()) or "-"
    return value if isinstance(value, str) else f"{value:g}"


def statistic_text(name: str, statistic: Statistic | None, sign: str = "") -> str:
    """Mean and deviation; of a difference, which has a sign, also the 95 % interval."""
    if statistic is None or math.isnan(statistic.mean):
        return "-"
    factor, digits = (100, 2) if in_percent(name) else (1, 4)
    text = f"{factor * statistic.mean:{sign}.{digits}f}"
    if math.isnan(statistic.std):
        return text
    text += f" +- {factor * statistic.std:.{digits}f}"
    if sign:
        text += f" [{factor * statistic.low:+.{digits}f}, {factor * statistic.high:+.{digits}f}]"
    return text
