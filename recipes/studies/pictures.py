"""Pictures of a study: learned relations, learning curves, conflicts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saliency_reg.integrations.plot import draw_relations

from ..runtime.errors import need
from ..runtime.figures import new_figure, save
from .study import Setting, Study
from .verdicts import our_method

#: Okabe and Ito's palette, safe for colour-blind readers, with line styles for print without colour.
_STYLES = (
    ("#000000", ":"),
    ("#E69F00", "--"),
    ("#D55E00", "-"),
    ("#56B4E9", "-"),
    ("#999999", ":"),
    ("#999999", "-"),
    ("#0072B2", "-"),
    ("#CC79A7", "-."),
    ("#009E73", (0, (5, 1))),
    ("#D55E00", (0, (4, 1, 1, 1))),
    ("#56B4E9", (0, (4, 1, 1, 1))),
)
#: Of many methods.
_FURTHER_DASHES = ("-", "--", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (2, 1)))
#: Bands of more lines than this hide each other.
_MOST_BANDS = 5
#: So many lines can be told apart; of more methods the baseline is shown, ours, and the best by validation.
_MOST_LINES, _BEST = 12, 4


@dataclass(frozen=True)
class Curve:
    """What one method measured by epoch, over seeds.

    Attributes:
        label: of the method.
        style: colour and dashes, the same in all pictures.
        epochs: of the looks.
        per_seed: measure to ``[seeds, looks]``.
    """

    label: str
    style: tuple[str, Any]
    epochs: list[float]
    per_seed: Mapping[str, Any]


def draw_study(study: Study, folder: Path | None) -> str:
    """Draw each setting: relations of every regularizer, learning curves of all methods, conflicts of task gradients."""
    if folder is None:
        return ""
    for setting in study.settings:
        prefix = "" if len(study.settings) == 1 else f"{setting.key}_"
        _draw_relations(study, setting, folder, prefix)
        curves = curves_of(study, setting)
        surgery = {key: own for key, own in curves.items() if getattr(study.methods[key], "surgery", None) is not None}
        others = {key: own for key, own in curves.items() if key not in surgery}
        baseline = {key: own for key, own in others.items() if key == study.baseline}
        for name, chosen in (("", others), ("_surgery", {**baseline, **surgery} if surgery else {})):
            if chosen:
                shown = shown_curves(study, setting, chosen)
                chosen = {key: own for key, own in chosen.items() if key in shown}
                draw_learning_curves(folder / f"{prefix}learning_curves{name}.png", list(chosen.values()))
        if conflicts := [curve for curve in curves.values() if "conflicts" in curve.per_seed]:
            draw_conflicts(folder / f"{prefix}conflicts.png", conflicts)
    return ""


def _draw_relations(study: Study, setting: Setting, folder: Path, prefix: str) -> None:
    for method in study.methods_of(setting):
        results = study.reported(setting, method).values()
        found = [result["relations"] for result in results if result.get("relations")]
        if found and method.rule != "fixed":
            mean = need("numpy").mean(found, axis=0)
            tasks = list(next(iter(results))["scores"])
            title = f"Learned relations, {method.label}, mean of {len(found)} seed{'s' if len(found) > 1 else ''}"
            draw_relations(mean, tasks, folder / f"{prefix}relations_{method.key}.png", title=title)


def curves_of(study: Study, setting: Setting) -> dict[str, Curve]:
    """What each method measured by epoch, by its key; methods without a result are left out."""
    numpy = need("numpy")
    found = {}
    for method, style in zip(study.methods_of(setting), itertools.cycle(_STYLES)):
        curves = [result["curves"] for result in study.reported(setting, method).values() if result.get("curves")]
        if curves:
            per_seed = {
                name: numpy.array([curve[name] for curve in curves], dtype=float)
                for name in curves[0]
                if all(name in curve for curve in curves)
            }
            found[method.key] = Curve(method.label, style, curves[0]["epoch"], per_seed)
    shown = shown_curves(study, setting, found)
    if len(shown) == len(found):
        return found
    # Those that are shown at first are told apart most easily; others are told apart from each other, too.
    order = sorted(found, key=lambda key: key not in shown)
    styles = dict(zip(order, itertools.cycle(_many_styles())))
    return {key: replace(curve, style=styles[key]) for key, curve in found.items()}


def shown_curves(study: Study, setting: Setting, curves: Mapping[str, Curve]) -> set[str]:
    """Keys of the methods to show: all, or of many the baseline, that of the verdict, and the best by validation score."""
    if len(curves) <= _MOST_LINES:
        return set(curves)
    ours = our_method(study, setting)
    best = {key: _best_validation(curve) for key, curve in curves.items()}
    order = sorted(curves, key=lambda key: -best[key])
    return set(curves) & {study.baseline, *([] if ours is None else [ours.key]), *order[:_BEST]}


def _best_validation(curve: Curve) -> float:
    numpy = need("numpy")
    scores = curve.per_seed.get("validation_score")
    found = numpy.array([]) if scores is None else scores.mean(0)
    found = found[numpy.isfinite(found)]
    return float(found.max()) if len(found) else -numpy.inf


def _many_styles() -> list[tuple[str, Any]]:
    """Each colour with each of the dashes, solid lines first."""
    colours = dict.fromkeys(colour for colour, _ in _STYLES)
    return [(colour, dashes) for dashes in _FURTHER_DASHES for colour in colours]


def draw_learning_curves(path: Path, curves: list[Curve]) -> None:
    """Draw loss and score by epoch: mean over seeds, with a band of one standard deviation if there are few methods."""
    figure, (left, right) = new_figure(9.0, 3.9, columns=2)
    loss = "validation_loss" if all("validation_loss" in curve.per_seed for curve in curves) else "training_loss"
    _draw_by_epoch(left, curves, loss, 1.0)
    _draw_by_epoch(right, curves, "validation_score", 100.0)
    left.set_ylabel(loss.replace("_", " "))
    right.set_ylabel("validation score (%)")
    left.set_ylim(bottom=0)
    _stretch_towards_100(right)
    _describe_lines(figure, left, curves, "Mean over tasks")
    save(figure, path)


def draw_conflicts(path: Path, curves: list[Curve]) -> None:
    """Share of conflicting task gradients by epoch."""
    figure, axes = new_figure(6.4, 4.2)
    _draw_by_epoch(axes, curves, "conflicts", 100.0)
    axes.set_ylabel("pairs of tasks in conflict (%)")
    axes.set_ylim(0, 100)
    _describe_lines(figure, axes, curves, "Task gradients at the feature map")
    save(figure, path)


def _draw_by_epoch(axes: Any, curves: list[Curve], name: str, factor: float) -> None:
    for curve in curves:
        colour, dashes = curve.style
        values = factor * curve.per_seed[name]
        mean = values.mean(0)
        axes.plot(curve.epochs, mean, color=colour, linestyle=dashes, linewidth=1.6, label=curve.label)
        if len(values) > 1 and len(curves) <= _MOST_BANDS:
            spread = values.std(0, ddof=1)
            axes.fill_between(curve.epochs, mean - spread, mean + spread, color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(need("matplotlib.ticker").MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.01)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _describe_lines(figure: Any, axes: Any, curves: list[Curve], title: str) -> None:
    """Legend below, and above what the lines are."""
    seeds = max(len(values) for curve in curves for values in curve.per_seed.values())
    handles, names = axes.get_legend_handles_labels()
    columns = min(len(names), 5 if len(names) <= 5 else round(figure.get_figwidth() / 2.2))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    lines = "lines and bands: mean and standard deviation" if axes.collections else "lines: mean"
    what = f"; {lines} of {seeds} seeds" if seeds > 1 else ", one seed"
    figure.suptitle(f"{title}{what}", fontsize=10)


def _stretch_towards_100(axes: Any) -> None:
    """A logarithmic scale of what is missing to 100 %, where good methods differ."""
    numpy = need("numpy")
    least_missing = 0.1
    low, high = axes.dataLim.intervaly
    axes.set_yscale(
        "function",
        functions=(
            lambda percent: -numpy.log10(numpy.maximum(100 - percent, least_missing)),
            lambda stretched: 100 - 10**-stretched,
        ),
    )
    low, top = max(low - 1, 0.0), min(100 - 0.8 * (100 - high), 100 - least_missing)
    axes.set_ylim(low, top)
    ticks = [tick for tick in (0, 50, 70, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9) if low <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
