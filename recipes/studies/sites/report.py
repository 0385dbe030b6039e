"""What learned relations add to uniform ones, everything else being equal."""

from __future__ import annotations

from pathlib import Path

from ..study import Study
from ..tables import markdown_table, statistic_text
from .methods import FAMILIES, METHODS, key_of


def learned_against_uniform(study: Study, folder: Path | None) -> str:
    """A table for each setting: paired differences of each rule to uniform weights with the same metric and start."""
    del folder
    tables = []
    for setting in study.settings:
        metric = "auc" if setting.values["data"] == "digits" else "nmse"
        rows = [["method", "to uniform weights, otherwise the same", "better in"]]
        for (distance, late), rules in FAMILIES.items():
            uniform = METHODS[key_of("fixed", distance, late)]
            theirs = study.reported(setting, uniform) if uniform.key in setting.methods else {}
            for method in (METHODS[key_of(rule, distance, late)] for rule in rules):
                ours = study.reported(setting, method) if method.key in setting.methods else {}
                pairs = [
                    (ours[seed]["macro"][metric], theirs[seed]["macro"][metric]) for seed in set(ours) & set(theirs)
                ]
                if pairs:
                    better = sum(a > b if metric == "auc" else a < b for a, b in pairs)
                    found = study.difference(setting, method, (metric,), reference=uniform)[metric]
                    rows.append([method.label, statistic_text(metric, found, sign="+"), f"{better} of {len(pairs)}"])
        if len(rows) > 1:
            tables.append(f"### {setting.label}: learned relations\n\n{markdown_table(rows)}")
    return "\n\n".join(tables)
