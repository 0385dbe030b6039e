"""What the synthetic comparison has beside the common tables: ratios, relations and their picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...runtime.errors import need
from ...runtime.figures import new_figure, save
from ...runtime.tables import aligned
from ..study import Setting, Statistic, Study
from .methods import SINGLE_TASK
from .problem import FACTORS, TASKS

METRICS = ("rmse", "error_inside", "error_outside")
#: The relations of the first are drawn; the improvement of all.
PICTURED = ("srdml", "srdml_sqchordal")
_COLOURS = ("#0072B2", "#E69F00")

Errors = Mapping[str, Mapping[int, float]]


def report(study: Study, folder: Path) -> str:
    """Lay out ratios, seeds won against hard sharing and the quality of relations, and draw the panels."""
    (setting,) = study.settings
    methods = study.methods_of(setting)
    results = {method.key: list(study.reported(setting, method).values()) for method in methods}
    errors = test_errors(study, setting)
    base = best_single_task(errors)
    against = "" if base is None else f"; ratio to: {study.methods[base].label}"
    title = "Test, mean +- standard deviation over seeds of the mean RMSE of the tasks"
    parts = [f"{title}{against}:\n{_ratio_table(study, setting, errors, base)}"]
    if differences := difference_rows(study, setting, errors):
        rows = [["", "seeds", "difference of RMSE", "lower", "equal", "higher"], *differences]
        title = "Shared layer: test RMSE minus that of hard sharing, and in how many seeds it is lower, equal or higher"
        parts.append(f"{title}:\n{aligned(rows, left=1)}")
    found = {key: [result["relations"] for result in own if result["relations"]] for key, own in results.items()}
    relations = {key: torch.tensor(own, dtype=torch.float64) for key, own in found.items() if own}
    if relations:
        table = _quality_table({study.methods[key].label: own for key, own in relations.items()})
        parts.append(f"Relations, in their mean over the seeds and seed by seed:\n{table}")
    if base is not None and PICTURED[0] in relations:
        improvement = {
            study.methods[key].label: _improvement(study, setting, key, base)
            for key in PICTURED
            if errors.get(key, {}).keys() & errors[base].keys()
        }
        _draw_panels(folder / "panels.png", relations[PICTURED[0]].numpy(), improvement, base)
    return "\n\n".join(parts)


def test_errors(study: Study, setting: Setting) -> dict[str, dict[int, float]]:
    """Mean test RMSE of the tasks, by method and seed."""
    return {
        method.key: {seed: result["macro"]["rmse"] for seed, result in study.reported(setting, method).items()}
        for method in study.methods_of(setting)
    }


def best_single_task(errors: Errors) -> str | None:
    """The single-task method with the lowest test RMSE: the hardest one to beat."""
    found = [key for key in SINGLE_TASK if errors.get(key)]
    return min(found, key=lambda key: statistics.fmean(errors[key].values()), default=None)


def ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float] | None:
    """The ratio of the means over the seeds that both have, and the largest ratio within a seed."""
    both = [seed for seed in ours if seed in theirs]
    if not both:
        return None
    of_means = statistics.fmean(ours[seed] for seed in both) / statistics.fmean(theirs[seed] for seed in both)
    return of_means, max(ours[seed] / theirs[seed] for seed in both)


def _ratio_table(study: Study, setting: Setting, errors: Errors, base: str | None) -> str:
    rows = [["", "seeds", "RMSE", "ratio", "worst seed", "error in span", "outside"]]
    for method in study.methods_of(setting):
        summary, own = study.summary(setting, method, METRICS), errors[method.key]
        found = None if base is None else ratios(own, errors[base])
        if not summary:
            rows.append([method.label, "0", *("-",) * 5])
            continue
        both = [f"{ratio:.3f}" for ratio in found] if found else ["-", "-"]
        sizes = [f"{summary[name].mean:.3f}" for name in METRICS[1:]]
        rows.append([method.label, str(len(own)), _text(summary["rmse"]), *both, *sizes])
    return aligned(rows, left=1)


def difference_rows(study: Study, setting: Setting, errors: Errors) -> list[list[str]]:
    """What surgery and SRDML change in the RMSE with a shared layer, within each seed."""
    rows = []
    for method in study.methods_of(setting):
        difference = study.difference(setting, method, METRICS[:1])
        if method.shared and difference:
            ours, theirs = errors[method.key], errors[study.baseline]
            signs = [np.sign(ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
            counts = [str(signs.count(sign)) for sign in (-1, 0, 1)]
            rows.append([method.label, str(len(signs)), _text(difference["rmse"], sign="+"), *counts])
    return rows


def _quality_table(relations: Mapping[str, Tensor]) -> str:
    """How well the relations order the pairs, in their mean over the seeds and seed by seed."""
    twins = len(TASKS) // 2
    rows = [["", f"twins among the {twins} strongest", "seeds with all", "AUC same sign", "lowest AUC of a seed"]]
    for label, found in relations.items():
        mean, each = relation_quality(found.mean(0)), [relation_quality(matrix) for matrix in found]
        complete = sum(quality["twins_on_top"] == twins for quality in each)
        lowest = min(quality["same_base_auc"] for quality in each)
        on_top = f"{mean['twins_on_top']:.0f} of {twins}"
        rows.append([label, on_top, f"{complete} of {len(each)}", f"{mean['same_base_auc']:.3f}", f"{lowest:.3f}"])
    return aligned(rows, left=1)


def relation_quality(matrix: Tensor) -> dict[str, float]:
    """How learned relations ``[T, T]`` order the pairs.

    ``twins_on_top``: how many of the pairs with equal weights are among as many strongest pairs.
    ``same_base_auc``: the probability that a pair of equal signs is stronger than one of opposite signs.
    """
    row, column = torch.triu_indices(len(TASKS), len(TASKS), 1)
    factors, weights = torch.tensor(FACTORS, dtype=torch.float64), matrix[row, column]
    twins = factors[row] == factors[column]
    # A tie counts against the twins: only pairs above all others are surely on top.
    others = weights[~twins].sort(descending=True).values
    rank = (others >= weights[twins].unsqueeze(1)).sum(1) + (weights[twins] > weights[twins].unsqueeze(1)).sum(1)
    same, opposite = (
        weights[chosen] for chosen in (factors[row] * factors[column] > 0, factors[row] * factors[column] < 0)
    )
    difference = same.unsqueeze(1) - opposite
    area = ((difference > 0).double() + 0.5 * (difference == 0).double()).mean()
    return {"twins_on_top": float((rank < twins.sum()).sum()), "same_base_auc": float(area)}


def _text(statistic: Statistic, sign: str = "") -> str:
    text = f"{statistic.mean:{sign}.3f}"
    return text if np.isnan(statistic.std) else f"{text} +- {statistic.std:.3f}"


def _improvement(study: Study, setting: Setting, key: str, base: str) -> np.ndarray[Any, Any]:
    """Quartiles over the seeds of how much lower the test RMSE of each task is, in percent."""
    ours, theirs = (study.reported(setting, study.methods[name]) for name in (key, base))
    both = [seed for seed in ours if seed in theirs]
    own, single = (
        np.array([[score["rmse"] for score in results[seed]["scores"].values()] for seed in both])
        for results in (ours, theirs)
    )
    quartiles: np.ndarray[Any, Any] = np.percentile(100 * (1 - own / single), (25, 50, 75), axis=0)
    return quartiles


def _draw_panels(path: Path, relations: Any, improvement: Mapping[str, Any], base: str) -> None:
    """True similarity, learned relations, improvement over single-task."""
    figure, (left, middle, right) = new_figure(13.6, 4.4, columns=3)
    factors = np.array(FACTORS)
    distance = np.abs(factors[:, None] - factors)
    diagonal = np.eye(len(TASKS), dtype=bool)
    colormaps, grey = need("matplotlib").colormaps, "#bdbdbd"
    image = left.imshow(
        np.ma.masked_where(diagonal, distance), cmap=colormaps["Blues_r"].with_extremes(bad=grey), vmin=0
    )
    left.set_title("(a) True distance of the tasks, $|a_i - a_j|$", fontsize=10)
    bar = figure.colorbar(image, ax=left, fraction=0.046, pad=0.03)
    bar.ax.invert_yaxis()  # related tasks on top, as in (b)
    bar.outline.set_visible(False)
    bar.set_label("$|a_i - a_j|$")

    relative = relations.mean(0) * len(TASKS) * (len(TASKS) - 1) / 2
    top = float(relative.max())
    # Not below eight decades: weights of unrelated pairs are astronomically small where the temperature is low.
    lowest = max(float(relative[~diagonal].min()), top / 1e8)
    scale = need("matplotlib.colors").LogNorm(vmin=lowest, vmax=top, clip=True)
    colours = colormaps["Blues"].with_extremes(bad=grey)
    image = middle.imshow(np.ma.masked_where(diagonal, relative), cmap=colours, norm=scale)
    middle.set_title(f"(b) Learned relations, l1 entropic, mean of {len(relations)} seeds", fontsize=10)
    bar = figure.colorbar(image, ax=middle, fraction=0.046, pad=0.03, extend="min")
    bar.set_label("relation weight / uniform weight")
    bar.outline.set_visible(False)
    for axes in (left, middle):
        _ticks_of_pairs(axes)
    _draw_improvement(right, improvement)
    name = "ridge" if base == "single_ridge" else "early stopping"
    right.set_title(f"(c) Improvement over single-task ({name})", fontsize=10)
    figure.get_layout_engine().set(wspace=0.06)
    save(figure, path)


def _ticks_of_pairs(axes: Any) -> None:
    axes.set_xticks(range(len(TASKS)), _names(), fontsize=8)
    axes.set_yticks(range(len(TASKS)), _names(), fontsize=8)
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks([index - 0.5 for index in range(2, len(TASKS), 2)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("task, by its factor $a$")
    axes.set_ylabel("task, by its factor $a$")


def _draw_improvement(axes: Any, improvement: Mapping[str, Any]) -> None:
    places = np.arange(len(TASKS))
    width = 0.8 / len(improvement)
    for index, (label, (low, middle, high)) in enumerate(improvement.items()):
        offset, colour = (index - (len(improvement) - 1) / 2) * width, _COLOURS[index]
        axes.bar(places + offset, middle, width, color=colour, label=label)
        spread = (middle - low, high - middle)
        axes.errorbar(places + offset, middle, spread, fmt="none", ecolor="#404040", elinewidth=0.8, capsize=1.5)
    lowest = min(0.0, *(float(low.min()) for low, _, _ in improvement.values()))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(max(-110.0, 1.05 * lowest), 104)
    axes.set_box_aspect(1)
    axes.set_xticks(places, _names(), fontsize=8)
    axes.set_xlabel("task, by its factor $a$")
    axes.set_ylabel("lower test RMSE by (%): median, quartiles")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=len(improvement), loc="upper center", bbox_to_anchor=(0.46, -0.14))


def _names() -> list[str]:
    return [f"{factor:+.0f}".replace("-", "\N{MINUS SIGN}") for factor in FACTORS]
