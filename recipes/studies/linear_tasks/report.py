"""What the synthetic comparison has beside the common tables: ratios, relations and their picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import need
from ...runtime.figures import new_figure, save
from ...runtime.tables import aligned
from ..study import Study
from .methods import SINGLE_TASK
from .problem import FACTORS, TASKS

METRICS = ("rmse", "error_inside", "error_outside")
#: The relations of the first are drawn; the improvement of all.
PICTURED = ("srdml", "srdml_sqchordal")
_COLOURS = ("#0072B2", "#E69F00")
_NAMES = [f"{factor:+.0f}".replace("-", "\N{MINUS SIGN}") for factor in FACTORS]
_DIAGONAL = np.eye(len(TASKS), dtype=bool)


def report(study: Study, folder: Path | None) -> str:
    """Lay out ratios, seeds won against hard sharing and the quality of relations; draw the panels into a folder."""
    (setting,) = study.settings
    results = {method.key: study.reported(setting, method) for method in study.methods_of(setting)}
    labels = {key: study.methods[key].label for key in results}
    rmse, inside, outside = (_by_seed(results, name) for name in METRICS)
    # Of the single-task methods the one with the lowest test RMSE: the hardest one to beat.
    single = rmse.reindex(columns=SINGLE_TASK).mean().dropna()
    base = None if single.empty else str(single.idxmin())
    against = "" if base is None else f"; ratio to: {labels[base]}"
    title = f"Test, mean +- standard deviation over seeds of the mean RMSE of the tasks{against}"
    rows = [["", "seeds", "RMSE", "ratio", "worst seed", "error in span", "outside"]]
    for key, own in rmse.items():
        theirs = own * math.nan if base is None else rmse[base]
        both = own.notna() & theirs.notna()
        ratios = (own[both].mean() / theirs[both].mean(), (own / theirs).max())
        numbers = (*ratios, inside[key].mean(), outside[key].mean())
        texts = ("-" if math.isnan(number) else f"{number:.3f}" for number in numbers)
        rows.append([labels[key], str(own.count()), _mean_and_deviation(own), *texts])
    parts = [f"{title}:\n{aligned(rows, left=1)}"]
    rows = [["", "seeds", "difference of RMSE", "lower", "equal", "higher"]]
    for key in results:
        difference = (rmse[key] - rmse.get(study.baseline, math.nan)).dropna()
        if study.methods[key].shared and key != study.baseline and len(difference):
            counts = ((difference < 0).sum(), (difference == 0).sum(), (difference > 0).sum())
            text = _mean_and_deviation(difference, sign="+")
            rows.append([labels[key], str(len(difference)), text, *map(str, counts)])
    if len(rows) > 1:
        title = "Shared layer: test RMSE minus that of hard sharing, and in how many seeds it is lower, equal or higher"
        parts.append(f"{title}:\n{aligned(rows, left=1)}")
    found = {
        key: [result["relations"] for result in own.values() if result["relations"]] for key, own in results.items()
    }
    relations = {key: np.array(own) for key, own in found.items() if own}
    if relations:
        table = _quality_table({labels[key]: own for key, own in relations.items()})
        parts.append(f"Relations, in their mean over the seeds and seed by seed:\n{table}")
    shown = [] if base is None else [key for key in PICTURED if results.get(key, {}).keys() & results[base].keys()]
    if folder is not None and base is not None and shown and PICTURED[0] in relations:
        quartiles = {labels[key]: _improvement(results[key], results[base]) for key in shown}
        _draw_panels(folder / "panels.png", relations[PICTURED[0]], quartiles, base)
    return "\n\n".join(parts)


def _by_seed(results: Mapping[str, Mapping[int, Any]], metric: str) -> Any:
    """A frame with a column for each method; NaN where there is no result yet."""
    values = {key: {seed: result["macro"][metric] for seed, result in own.items()} for key, own in results.items()}
    return need("pandas").DataFrame(values, dtype=float)


def _quality_table(relations: Mapping[str, Any]) -> str:
    twins = len(TASKS) // 2
    rows = [["", f"twins among the {twins} strongest", "seeds with all", "AUC same sign", "lowest AUC of a seed"]]
    for label, found in relations.items():
        (on_top, area), each = relation_quality(found.mean(0)), [relation_quality(matrix) for matrix in found]
        complete = f"{sum(top == twins for top, _ in each)} of {len(each)}"
        lowest = min(area for _, area in each)
        rows.append([label, f"{on_top} of {twins}", complete, f"{area:.3f}", f"{lowest:.3f}"])
    return aligned(rows, left=1)


def relation_quality(matrix: Any) -> tuple[int, float]:
    """How learned relations ``[T, T]`` order the pairs.

    Returns:
        How many of the pairs with equal weights are among as many strongest pairs, and the probability that a pair of equal
        signs is stronger than one of opposite signs.
    """
    row, column = np.triu_indices(len(TASKS), 1)
    factors, weights = np.array(FACTORS), np.asarray(matrix)[row, column]
    twins = factors[row] == factors[column]
    # A tie counts against the twins: only pairs above all others are surely on top.
    ranks = [(weights[~twins] >= own).sum() + (weights[twins] > own).sum() for own in weights[twins]]
    area = need("sklearn.metrics").roc_auc_score(factors[row] * factors[column] > 0, weights)
    return sum(rank < twins.sum() for rank in ranks), float(area)


def _mean_and_deviation(values: Any, sign: str = "") -> str:
    mean, deviation = values.mean(), values.std()
    text = "-" if math.isnan(mean) else f"{mean:{sign}.3f}"
    return text if math.isnan(deviation) else f"{text} +- {deviation:.3f}"


def _improvement(ours: Mapping[int, Any], theirs: Mapping[int, Any]) -> Any:
    """Quartiles over the seeds of how much lower the test RMSE of each task is, in percent."""
    own, single = (
        {seed: {task: score["rmse"] for task, score in result["scores"].items()} for seed, result in results.items()}
        for results in (ours, theirs)
    )
    frame = need("pandas").DataFrame
    return (100 * (1 - frame(own) / frame(single))).quantile([0.25, 0.5, 0.75], axis=1).to_numpy()


def _draw_panels(path: Path, relations: Any, improvement: Mapping[str, Any], base: str) -> None:
    """True similarity, learned relations, improvement over single-task."""
    figure, (left, middle, right) = new_figure(13.6, 4.4, columns=3)
    colors = need("matplotlib.colors")
    distance = np.abs(np.subtract.outer(FACTORS, FACTORS))
    title, scale = "(a) True distance of the tasks, $|a_i - a_j|$", colors.Normalize(0, distance.max())
    bar = _draw_pairs(figure, left, distance, title, "Blues_r", scale, label="$|a_i - a_j|$")
    bar.ax.invert_yaxis()  # related tasks on top, as in (b)
    relative = relations.mean(0) * len(TASKS) * (len(TASKS) - 1) / 2
    top = float(relative.max())
    # Not below eight decades: weights of unrelated pairs are astronomically small where the temperature is low.
    lowest = max(float(relative[~_DIAGONAL].min()), top / 1e8)
    title, scale = (
        f"(b) Learned relations, l1 entropic, mean of {len(relations)} seeds",
        colors.LogNorm(lowest, top, True),
    )
    label = "relation weight / uniform weight"
    _draw_pairs(figure, middle, relative, title, "Blues", scale, label=label, extend="min")
    _draw_improvement(right, improvement)
    name = "ridge" if base == "single_ridge" else "early stopping"
    right.set_title(f"(c) Improvement over single-task ({name})", fontsize=10)
    figure.get_layout_engine().set(wspace=0.06)
    save(figure, path)


def _draw_pairs(figure: Any, axes: Any, values: Any, title: str, colours: str, scale: Any, **of_bar: Any) -> Any:
    colormap = need("matplotlib").colormaps[colours].with_extremes(bad="#bdbdbd")
    image = axes.imshow(np.ma.masked_where(_DIAGONAL, values), cmap=colormap, norm=scale)
    axes.set_title(title, fontsize=10)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, **of_bar)
    bar.outline.set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(range(len(TASKS)), _NAMES, fontsize=8)
        axis.set_ticks(np.arange(2, len(TASKS), 2) - 0.5, minor=True)
        axis.set_label_text("task, by its factor $a$")
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return bar


def _draw_improvement(axes: Any, improvement: Mapping[str, Any]) -> None:
    places = np.arange(len(TASKS))
    width = 0.8 / len(improvement)
    for index, (label, (low, middle, high)) in enumerate(improvement.items()):
        offset, colour = (index - (len(improvement) - 1) / 2) * width, _COLOURS[index]
        spread, line = (middle - low, high - middle), {"ecolor": "#404040", "elinewidth": 0.8, "capsize": 1.5}
        axes.bar(places + offset, middle, width, yerr=spread, color=colour, label=label, error_kw=line)
    lowest = min(0.0, *(float(low.min()) for low, _, _ in improvement.values()))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(max(-110.0, 1.05 * lowest), 104)
    axes.set_box_aspect(1)
    axes.set_xticks(places, _NAMES, fontsize=8)
    axes.set_xlabel("task, by its factor $a$")
    axes.set_ylabel("lower test RMSE by (%): median, quartiles")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=len(improvement), loc="upper center", bbox_to_anchor=(0.46, -0.14))
