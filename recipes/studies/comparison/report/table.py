"""The table of a comparison: that of a study, with adjusted intervals, the gain over single-task, and costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ....methods.methods import Method
from ...study import Setting, Study
from ...tables import column_title, in_percent, markdown_table, rows_of, title_of
from .costs import costs_of, count_text, memory_text, step_text
from .delta_m import delta_m_of, mean_and_std
from .intervals import adjusted_interval, challengers, reach
from .options import TRIVIAL, Published

#: Metrics, those that are compared, and those that the verdict is about.
Columns = tuple[Sequence[str], Sequence[str], Sequence[str]]

#: Left out where no method has any.
_MORE = ("delta-m %", "step time", "peak memory", "parameters")


def legend(study: Study) -> str:
    """What the columns are, and how large a difference has to be."""
    found = [
        "Adjusted intervals hold for all methods of a table at once (95 %): paired t intervals with Bonferroni's "
        "correction, one for each method but the baseline and the trivial model. The verdict goes by them: the best of many "
        "methods looks good by chance."
    ]
    for setting in study.settings:
        methods = len(challengers(study, setting))
        if methods and len(study.seeds) > 1:
            found.append(
                f"With {len(study.seeds)} seeds and {methods} methods a mean difference is clear above "
                f"{reach(len(study.seeds), methods):.1f} standard deviations of the differences."
            )
            break
    found.append(
        "Delta-m is the mean over the tasks of the relative change to single-task with the same seed, in %, above 0 where "
        "tasks gain (Maninis et al. 2019). Step time is relative to the baseline with the same seed (median over seeds), "
        "peak memory the largest."
    )
    if any("nmse" in result["macro"] for result in _results(study)):
        found.append("nMSE is the mean squared error over the variance of the labels.")
    for setting in study.settings:
        if edges := at_the_edge(study, setting):
            found.append(
                f"The best value is the largest that was tried, so that a larger one may be better: {', '.join(edges)}."
            )
    return " ".join(found)


def at_the_edge(study: Study, setting: Setting) -> list[str]:
    """The methods whose chosen value is the largest of several; to the other side grids go down to nothing."""
    found = []
    for method in study.methods_of(setting):
        tried = [value for value, _ in study.tuning(setting, method) if isinstance(value, (int, float))]
        if len(tried) > 1 and study.chosen(setting, method) == max(tried):
            found.append(method.label)
    return found


def _results(study: Study) -> list[Mapping[str, Any]]:
    return [
        result
        for setting in study.settings
        for method in study.methods_of(setting)
        for result in study.reported(setting, method).values()
    ]


def comparison_rows(study: Study, setting: Setting, columns: Columns) -> list[list[str]]:
    """The rows of :func:`.tables.rows_of`, with more columns: the baseline first, the trivial model last.

    The metric of the verdict comes first, and what was tuned last: on a narrow screen one sees what counts.
    """
    metrics, compared, judged = columns
    titles, *rows = rows_of(study, setting, metrics, compared)
    methods, places = study.methods_of(setting), {study.baseline: -1, TRIVIAL: 1}
    known = [dict(zip(titles, row)) for row in rows]
    for row, method in zip(known, methods):
        for name in compared:
            interval = adjusted_interval(study, setting, method, name)
            row[_adjusted(name)] = _interval_text(name, interval)
        row.update(_more(study, setting, method, columns))
    names = [name for name in dict.fromkeys((*judged, *compared, *metrics)) if column_title(name) in titles]
    order = ["method"]
    for name in names:
        difference = f"difference in {title_of(name)}"
        order += [column_title(name), *([difference, _adjusted(name)] if difference in titles else [])]
    order += [title for title in _MORE if any(row[title] != "-" for row in known)]
    order += ["tuned", "seeds"]
    sorted_rows = [row for row, _ in sorted(zip(known, methods), key=lambda own: places.get(own[1].key, 0))]
    return [order, *([row[title] for title in order] for row in sorted_rows)]


def comparison_markdown(study: Study, columns: Columns) -> str:
    """One table for each setting."""
    tables = [
        f"### {setting.label}\n\n{markdown_table(comparison_rows(study, setting, columns))}"
        for setting in study.settings
    ]
    return "\n\n".join(tables)


def published_rows(published: Published) -> list[list[str]]:
    """Figures of a paper, in its words: titles, and a row for each method."""
    metrics = list(dict.fromkeys(name for own in published.figures.values() for name in own))
    rows = [[method, *(str(own.get(name, "-")) for name in metrics)] for method, own in published.figures.items()]
    return [["published", *metrics], *rows]


def published_markdown(tables: Sequence[Published]) -> str:
    """Tables of their own, each with its source."""
    return "\n\n".join(
        f"### Published: {own.title}\n\n{own.source}\n\n{markdown_table(published_rows(own))}" for own in tables
    )


def further_figures(study: Study, setting: Setting, method: Method, columns: Columns) -> dict[str, Any]:
    """The same as plain numbers, for files; any study has them."""
    metrics, compared, judged = columns
    gains = delta_m_of(study, setting, method, [*judged, *compared, *metrics])
    mean, std = mean_and_std(list(gains.values()))
    names = study.difference(setting, method, metrics)
    intervals = {name: adjusted_interval(study, setting, method, name) for name in names}
    return {
        "adjusted": {name: {"low": low, "high": high} for name, (low, high) in intervals.items()},
        "delta_m": {
            "mean": mean,
            "std": std,
            "per_seed": [{"seed": seed, "value": gain} for seed, gain in gains.items()],
        },
        "costs": dataclasses.asdict(costs_of(study, setting, method)),
    }


def csv_figures(study: Study, columns: Columns) -> Callable[[Setting, Method, str], dict[str, float | None]]:
    """The columns that they are in a CSV file, of a setting, method and metric."""

    by_method: dict[tuple[str, str], dict[str, Any]] = {}

    def found(setting: Setting, method: Method, metric: str) -> dict[str, float | None]:
        key = (setting.key, method.key)
        if key not in by_method:
            by_method[key] = further_figures(study, setting, method, columns)
        known = by_method[key]
        interval, costs = known["adjusted"].get(metric, {}), known["costs"]
        return {
            "adjusted_low": interval.get("low"),
            "adjusted_high": interval.get("high"),
            "delta_m": known["delta_m"]["mean"],
            "delta_m_std": known["delta_m"]["std"],
            "step_time": costs["step"],
            "peak_memory": costs["peak_memory"],
            "parameters": costs["parameters"],
        }

    return found


def _adjusted(metric: str) -> str:
    return f"adjusted interval, {title_of(metric)}"


def _more(study: Study, setting: Setting, method: Method, columns: Columns) -> dict[str, str]:
    metrics, compared, judged = columns
    mean, std = mean_and_std(list(delta_m_of(study, setting, method, [*judged, *compared, *metrics]).values()))
    gain = "-" if math.isnan(mean) else f"{mean:+.2f}" if math.isnan(std) else f"{mean:+.2f} +- {std:.2f}"
    costs = costs_of(study, setting, method)
    cells = (gain, step_text(costs.step), memory_text(costs.peak_memory), count_text(costs.parameters))
    return dict(zip(_MORE, cells))


def _interval_text(metric: str, interval: tuple[float, float]) -> str:
    if math.isnan(interval[0]):
        return "-"
    factor, digits = (100, 2) if in_percent(metric) else (1, 4)
    return f"[{factor * interval[0]:+.{digits}f}, {factor * interval[1]:+.{digits}f}]"
