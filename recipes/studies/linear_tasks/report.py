"""Tables and the picture of the synthetic comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runtime.errors import need
from ...runtime.figures import new_figure, save
from ...runtime.tables import aligned
from .problem import FACTORS, TASKS

__all__ = ["PICTURED", "difference_table", "draw_panels", "quality_table", "result_table", "tuning_table"]

#: The relations of the first are drawn; the improvement of all.
PICTURED = ("l1_entropic", "sqchordal_entropic")
_COLOURS = ("#0072B2", "#E69F00")
_QUARTILES = ("lower_quartile", "median", "upper_quartile")
_FIRST_OF_PAIR = [index for index in range(len(TASKS)) if index % 2 == 0]


def tuning_table(methods: Mapping[str, Any]) -> str:
    """What was chosen of how many trials, and the spread of their validation RMSE."""
    rows = [["", "trials", "chosen", "validation RMSE", "best trials of the rest"]]
    for method in methods.values():
        trials = sorted(method["tuning"]["trials"], key=lambda trial: float(trial["validation_rmse"]))
        if trials and method["tuning"]["chosen"]:
            others = "   ".join(f"{_short(trial['setting'])}: {trial['validation_rmse']:.3f}" for trial in trials[1:4])
            best = f"{trials[0]['validation_rmse']:.3f}"
            rows.append([method["label"], str(len(trials)), method["tuning"]["chosen"], best, others])
    return aligned(rows, left=5)


def _short(setting: str) -> str:
    return "/".join(part.rpartition(" ")[2] for part in setting.split(", "))


def result_table(methods: Mapping[str, Any]) -> str:
    """Test RMSE, its ratio to the best single-task method, and where the weights are wrong."""
    rows = [["", "seeds", "RMSE", "ratio", "worst seed", "error in span", "outside"]]
    for method in methods.values():
        summary = method["summary"]
        if summary is None:
            rows.append([method["label"], "0", *("-",) * 5])
            continue
        ratios = [f"{summary[name]:.3f}" if name in summary else "-" for name in ("ratio", "worst_ratio")]
        errors = [f"{summary[name]['mean']:.3f}" for name in ("error_inside", "error_outside")]
        rows.append([method["label"], str(len(method["per_seed"])), _statistic(summary["rmse"]), *ratios, *errors])
    return aligned(rows, left=1)


def difference_table(methods: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    """RMSE minus that of hard sharing with the same seed."""
    rows = [["", "seeds", "difference of RMSE", "lower", "equal", "higher"]]
    for key, difference in differences.items():
        per_seed = difference["per_seed"]
        counts = [
            sum(value < 0 for value in per_seed),
            sum(value == 0 for value in per_seed),
            sum(value > 0 for value in per_seed),
        ]
        text = _statistic(difference["summary"], sign="+")
        rows.append([methods[key]["label"], str(len(per_seed)), text, *map(str, counts)])
    return aligned(rows, left=1)


def quality_table(methods: Mapping[str, Any], relations: Mapping[str, Any]) -> str:
    """How well the relations order the pairs, in their mean over the seeds and seed by seed."""
    twins = len(TASKS) // 2
    rows = [["", f"twins among the {twins} strongest", "seeds with all", "AUC same sign", "lowest AUC of a seed"]]
    for key, found in relations.items():
        mean, each = found["quality_of_mean"], found["quality_per_seed"]
        complete = sum(quality["twins_on_top"] == twins for quality in each)
        lowest = min(quality["same_base_auc"] for quality in each)
        rows.append(
            [
                methods[key]["label"],
                f"{mean['twins_on_top']:.0f} of {twins}",
                f"{complete} of {len(each)}",
                f"{mean['same_base_auc']:.3f}",
                f"{lowest:.3f}",
            ]
        )
    return aligned(rows, left=1)


def _statistic(statistic: Mapping[str, float | None], sign: str = "") -> str:
    mean, deviation = statistic["mean"], statistic["std"]
    text = f"{mean:{sign}.3f}"
    return text if deviation is None else f"{text} +- {deviation:.3f}"


def draw_panels(path: Path, content: Mapping[str, Any]) -> bool:
    """True similarity, learned relations, improvement over single-task; false if a part of it is missing."""
    methods, relations = content["methods"], content["relations"]
    shown = [key for key in PICTURED if key in methods and "improvement_percent" in (methods[key]["summary"] or {})]
    if PICTURED[0] not in relations or not shown:
        return False
    numpy = need("numpy")
    figure, (left, middle, right) = new_figure(13.6, 4.4, columns=3)
    factors = numpy.array(FACTORS)
    distance = numpy.abs(factors[:, None] - factors)
    diagonal = numpy.eye(len(TASKS), dtype=bool)
    blues, grey = need("matplotlib").colormaps, "#bdbdbd"
    image = left.imshow(
        numpy.ma.masked_where(diagonal, distance), cmap=blues["Blues_r"].with_extremes(bad=grey), vmin=0
    )
    left.set_title("(a) True distance of the tasks, $|a_i - a_j|$", fontsize=10)
    bar = figure.colorbar(image, ax=left, fraction=0.046, pad=0.03)
    bar.ax.invert_yaxis()  # related tasks on top, as in (b)
    bar.outline.set_visible(False)
    bar.set_label("$|a_i - a_j|$")

    found = relations[PICTURED[0]]
    relative = numpy.array(found["mean"]) * len(TASKS) * (len(TASKS) - 1) / 2
    top = float(relative.max())
    # Not below eight decades: weights of unrelated pairs are astronomically small where the temperature is low.
    scale = need("matplotlib.colors").LogNorm(
        vmin=max(float(relative[~diagonal].min()), top / 1e8), vmax=top, clip=True
    )
    colours = blues["Blues"].with_extremes(bad=grey)
    image = middle.imshow(numpy.ma.masked_where(diagonal, relative), cmap=colours, norm=scale)
    middle.set_title(f"(b) Learned relations, l1 entropic, mean of {len(found['seeds'])} seeds", fontsize=10)
    bar = figure.colorbar(image, ax=middle, fraction=0.046, pad=0.03, extend="min")
    bar.set_label("relation weight / uniform weight")
    bar.outline.set_visible(False)
    for axes in (left, middle):
        _ticks_of_pairs(axes)
    _draw_improvement(right, [methods[key] for key in shown])
    base = "ridge" if content["best_single_task"] == "single_ridge" else "early stopping"
    right.set_title(f"(c) Improvement over single-task ({base})", fontsize=10)
    figure.get_layout_engine().set(wspace=0.06)
    save(figure, path)
    return True


def _ticks_of_pairs(axes: Any) -> None:
    axes.set_xticks(range(len(TASKS)), _names(), fontsize=8)
    axes.set_yticks(range(len(TASKS)), _names(), fontsize=8)
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks([index - 0.5 for index in _FIRST_OF_PAIR[1:]], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("task, by its factor $a$")
    axes.set_ylabel("task, by its factor $a$")


def _draw_improvement(axes: Any, methods: Sequence[Mapping[str, Any]]) -> None:
    numpy = need("numpy")
    places = numpy.arange(len(TASKS))
    width = 0.8 / len(methods)
    lowest = 0.0
    for index, (method, colour) in enumerate(zip(methods, _COLOURS)):
        improvement = method["summary"]["improvement_percent"]
        low, middle, high = (numpy.array(improvement[name], dtype=float) for name in _QUARTILES)
        offset = (index - (len(methods) - 1) / 2) * width
        axes.bar(places + offset, middle, width, color=colour, label=method["label"])
        spread = (middle - low, high - middle)
        axes.errorbar(places + offset, middle, spread, fmt="none", ecolor="#404040", elinewidth=0.8, capsize=1.5)
        lowest = min(lowest, float(low.min()))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(max(-110.0, 1.05 * lowest), 104)
    axes.set_box_aspect(1)
    axes.set_xticks(places, _names(), fontsize=8)
    axes.set_xlabel("task, by its factor $a$")
    axes.set_ylabel("lower test RMSE by (%): median, quartiles")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=len(methods), loc="upper center", bbox_to_anchor=(0.46, -0.14))


def _names() -> list[str]:
    return [f"{factor:+.0f}".replace("-", "\N{MINUS SIGN}") for factor in FACTORS]
