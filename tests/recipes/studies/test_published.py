"""The published results: their tables have the numbers that they had with every earlier version."""

import importlib
import json

import pytest

from recipes.studies.results_file import ResultsFile

from ..support.commands import ROOT, call
from ..support.studies import table_rows

#: Recipe to how much is done, and some rows: heading of the table, and cells of the row without intervals.
PUBLISHED = {
    "cifar_grid": (
        "323 of 528",
        [
            (
                "500 training images, GELU heads",
                "SRDML | strength 0.03 | 5 | 90.78 +- 0.10 | 85.29 +- 0.32 | 54.29 +- 3.48 | 27.02 +- 2.10 | +0.09 +- 0.08 | +0.22 +- 0.19",
            ),
            (
                "2,000 training images, GELU heads, 90 % of the labels removed",
                "SRDML, sqchordal | strength 0.1 | 5 | 89.94 +- 0.06 | 78.39 +- 0.75 | 26.40 +- 13.24 | 6.48 +- 3.61 | -0.03 +- 0.04 | -0.55 +- 0.33",
            ),
            (
                "500 training images, ReLU heads",
                "SRDML, uniform weights | strength 0.03 | 5 | 90.78 +- 0.11 | 85.19 +- 0.31 | 54.51 +- 4.41 | 25.14 +- 0.89 | +0.08 +- 0.07 | +0.19 +- 0.19",
            ),
            (
                "2,000 training images, GELU heads",
                "Hard sharing | weight decay 0.5 | 5 | 92.02 +- 0.11 | 90.21 +- 0.30 | 67.88 +- 5.23 | 33.72 +- 1.50 | - | -",
            ),
        ],
    ),
    "go_emotions_grid": (
        "80 of 80",
        [
            (
                "8,000 training texts, all labels",
                "SRDML, sqchordal | strength 0.01 | 5 | 30.16 +- 0.72 | 79.41 +- 0.61 | 15.92 +- 0.77 | 78.11 +- 1.69 | "
                "-0.06 +- 0.53 | +0.34 +- 1.07 | +0.35 +- 2.57",
            ),
            (
                "8,000 training texts, 90 % of the labels removed",
                "SRDML w/ PCGrad (feature) | strength 0.003 | 5 | 6.58 +- 0.32 | 62.96 +- 0.72 | 0.30 +- 0.32 | "
                "62.80 +- 1.25 | +0.06 +- 0.16 | +2.94 +- 1.23 | +0.62 +- 2.16",
            ),
        ],
    ),
    "tabular": (
        "170 of 242",
        [
            (
                "SARCOS, 30 rows for each of 7 torques",
                "SRDML | strength 0.03 | 5 | 0.2962 +- 0.0183 | -0.0024 +- 0.0103",
            ),
            (
                "SARCOS, 30 rows for each of 7 torques",
                "SRDML, cosine | strength 0.1 | 5 | 0.3042 +- 0.0212 | +0.0056 +- 0.0088",
            ),
            (
                "SARCOS, 100 rows for each of 7 torques",
                "SRDML, sqchordal | strength 0.1 | 5 | 0.1210 +- 0.0156 | +0.0071 +- 0.0091",
            ),
            ("School, 139 tasks", "Hard sharing | not done | 0 of 5 | - | -"),
        ],
    ),
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_tables(recipe):
    path = ROOT / "docs" / "results" / f"{recipe}.jsonl"
    before = path.stat().st_mtime_ns, sorted(path.parent.iterdir())
    more = ("--tuning-seeds", "1") if recipe == "go_emotions_grid" else ()
    answer = call(importlib.import_module(f"recipes.{recipe}").main, "--minutes", "0", "--results", path, *more)
    assert answer.code == 0, answer.err
    done, rows = PUBLISHED[recipe]
    assert f"{done} trainings are done" in answer.out
    tables = {table.partition("\n")[0]: table_rows(table) for table in answer.out.split("### ")[1:]}
    for heading, row in rows:
        found = [[cell.partition(" [")[0] for cell in own] for own in tables[heading]]
        assert row.split(" | ") in found, heading
    assert (path.stat().st_mtime_ns, sorted(path.parent.iterdir())) == before, "who only reads writes nothing"


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_line_is_of_the_study(recipe):
    """No result is lost to another name of a method or of an option."""
    command = importlib.import_module(f"recipes.{recipe}").COMMAND
    path = ROOT / "docs" / "results" / f"{recipe}.jsonl"
    results = ResultsFile(path)
    cells = [json.loads(line)["cell"] for line in path.read_text().splitlines()]
    assert len(results) == len(cells)
    known = [dict(setting.values) for setting in command.settings.values()]
    for cell in cells:
        method = command.methods[cell["method"]]
        assert (cell["rule"], cell["metric"], cell["parameter"]) == (method.rule, method.metric, method.parameter)
        own = {name: value for name, value in cell.items() if name in known[0] or name in max(known, key=len)}
        if not method.tuned:  # it has the weight decay that hard sharing has chosen
            own["weight_decay"] = known[0]["weight_decay"]
        assert any(own == setting for setting in known)
        assert results.get({**cell, "method": method.key}) == results.get(cell)
