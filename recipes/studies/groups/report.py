"""What the study of groups has beside the common tables: errors by rows, shrinkage and relations as pictures, and notes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.errors import need
from ...runtime.figures import new_figure, save
from ..study import Setting, Study
from .fits import PICTURED_SEED
from .methods import HARD_SHARING, MIXED_MODEL, MIXED_MODEL_MORE, POOLED, SINGLE_TASK

#: Okabe and Ito's palette, safe for colour-blind readers, and a marker for print without colour.
_LINES = {
    SINGLE_TASK: ("#999999", "s"),
    HARD_SHARING: ("#E69F00", "^"),
    POOLED: ("#56B4E9", "v"),
    MIXED_MODEL: ("#009E73", "D"),
    "srdml": ("#D55E00", "o"),
    "srdml_default": ("#000000", "*"),
}
#: From groups on their own to what is common to all.
_SHRINKAGE = (SINGLE_TASK, HARD_SHARING, "srdml", "srdml_default", POOLED)
_EFFECTS = {"mean": "Mean prediction of each group", "slope": "Slope of each group along the common line"}


def report(study: Study, folder: Path | None) -> str:
    """Draw into a folder, if there is one, and tell which mixed models were fitted."""
    if folder is not None:
        _draw_errors(study, folder / "errors.png")
        for setting in study.settings:
            draw_setting(study, setting, folder)
    notes = []
    for setting in study.settings:
        for key in (MIXED_MODEL, MIXED_MODEL_MORE):
            if key in setting.methods:
                found = study.reported(setting, study.methods[key]).values()
                counts = Counter(result["note"].partition(":")[0] for result in found)
                told = ", ".join(f"{note} in {count} seeds" for note, count in counts.most_common())
                notes += [f"- {setting.label}, {study.methods[key].label}: {told}"] if told else []
    return "\n".join(["What the mixed models have:", *notes]) if notes else ""


def draw_setting(study: Study, setting: Setting, folder: Path) -> None:
    """Draw the shrinkage and the relations of one setting."""
    _draw_shrinkage(study, setting, folder / f"{setting.key}_shrinkage.png")
    for key in ("srdml", "srdml_default"):
        _draw_relations(study, setting, key, folder / f"{setting.key}_relations_{key}.png")


def _draw_errors(study: Study, path: Path) -> None:
    """Test error against rows of each group, with 95 % intervals as bands: a panel for each table."""
    tables: dict[str, list[Setting]] = {}
    for setting in study.settings:
        if any(study.reported(setting, method) for method in study.methods_of(setting)):
            tables.setdefault(setting.values["data"], []).append(setting)
    tables = {name: sorted(own, key=lambda one: one.values["rows"]) for name, own in tables.items()}
    if not tables:
        return
    figure, axes = new_figure(3.3 * len(tables) + 0.6, 3.6, columns=len(tables))
    for panel, (name, own) in zip(np.atleast_1d(axes), tables.items()):
        for key, (colour, marker) in _LINES.items():
            points = []
            for setting in own:
                statistic = study.summary(setting, study.methods[key], ["nmse"]) if key in setting.methods else {}
                points += [(setting.values["rows"], statistic["nmse"])] if statistic else []
            if points:
                rows, values = [rows for rows, _ in points], [value for _, value in points]
                means = [value.mean for value in values]
                label = study.methods[key].label
                panel.plot(rows, means, color=colour, marker=marker, markersize=5, linewidth=1.5, label=label)
                low, high = [value.low for value in values], [value.high for value in values]
                panel.fill_between(rows, low, high, color=colour, alpha=0.15, linewidth=0)
                panel.vlines(rows, low, high, color=colour, linewidth=1.0)
        rows = [setting.values["rows"] for setting in own]
        panel.set_xscale("log")
        panel.set_xticks(rows, list(map(str, rows)))
        panel.xaxis.set_minor_locator(need("matplotlib.ticker").NullLocator())
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("training rows of each group")
        _plain(panel)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("test error / variance (lower is better)")
    handles = {
        label: handle for panel in np.atleast_1d(axes) for handle, label in zip(*panel.get_legend_handles_labels())
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 2 * len(tables)),
        frameon=False,
    )
    save(figure, path)


def _draw_shrinkage(study: Study, setting: Setting, path: Path) -> None:
    """Each group's line from its own estimate to the common one, in one seed."""
    found = {}
    for key in _SHRINKAGE:
        if key in setting.methods:
            result = study.reported(setting, study.methods[key]).get(PICTURED_SEED)
            if result is not None and result.get("effects"):
                found[key] = result["effects"]
    if len(found) < 2:
        return
    figure, panels = new_figure(9.0, 4.0, columns=len(_EFFECTS))
    for panel, (effect, text) in zip(panels, _EFFECTS.items()):
        values = np.array([found[key][effect] for key in found])  # [methods, T]
        order = values[0].argsort().argsort() / max(values.shape[1] - 1, 1)
        colours = need("matplotlib").colormaps["viridis"](order)
        for group, colour in enumerate(colours):
            panel.plot(range(len(found)), values[:, group], color=colour, linewidth=0.7, alpha=0.8)
        panel.plot(range(len(found)), values.mean(1), color="black", linewidth=2.0, marker="o", markersize=4)
        panel.set_xticks(range(len(found)), [_broken(study.methods[key].label) for key in found], fontsize=8)
        panel.set_title(text, fontsize=10)
        _plain(panel)
    figure.suptitle(f"{setting.label}; black: mean of the groups", fontsize=10)
    save(figure, path)


def _draw_relations(study: Study, setting: Setting, key: str, path: Path) -> None:
    """Relation weights of one seed; groups in the order of their mean prediction."""
    if key not in setting.methods:
        return
    result = study.reported(setting, study.methods[key]).get(PICTURED_SEED)
    if result is None or not result.get("relations"):
        return
    order = np.argsort(result["effects"]["mean"])
    weights = np.array(result["relations"])[np.ix_(order, order)]
    groups = len(weights)
    relative = np.where(np.eye(groups, dtype=bool), np.nan, weights * groups * (groups - 1) / 2)
    figure, axes = new_figure(5.4, 4.6)
    spread = max(float(np.nanmax(np.abs(np.log(np.maximum(relative, 1e-3))))), 0.05)
    scale = need("matplotlib.colors").LogNorm(np.exp(-spread), np.exp(spread))
    image = axes.imshow(relative, cmap="RdBu_r", norm=scale)
    figure.colorbar(image, ax=axes, label="relation weight / uniform weight").outline.set_visible(False)
    axes.set_title(f"{setting.label}: {study.methods[key].label}", fontsize=9)
    axes.set_xlabel("groups, by their mean prediction")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    save(figure, path)


def _broken(label: str) -> str:
    """In two lines where there is a comma."""
    return label.replace(", ", ",\n")


def _plain(axes: Any) -> None:
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
