"""The report of a comparison: the page, tables and files that all have the same numbers."""

import csv
import json

import pytest

from recipes.runtime.files import finite
from recipes.studies.comparison.report.intervals import adjusted_interval
from recipes.studies.comparison.report.options import Comparison, Published
from recipes.studies.comparison.report.table import comparison_rows, further_figures
from recipes.studies.page import Origin, page
from recipes.studies.snapshot import Snapshot
from recipes.studies.tables import as_numbers
from recipes.studies.written import summary, write_beside

from ....support.many_methods import finished
from ....support.small_study import in_turn, plain, setting, study
from ....support.studies import table_rows
from ...test_page import Parsed

COLUMNS = (["accuracy", "auc"], ["auc"], ["auc"])
PUBLISHED = Published("CIFAR-MTL", "A paper, table 1", {"Hard sharing": {"AUC": "95.56"}, "Ours": {"accuracy": "95.8"}})
COMPARISON = Comparison([PUBLISHED])
SEEDS = 5
KEYS = ("constant", "single_task", "hard_sharing", *(f"m{number:02}" for number in range(14)))


def figures(place, seed):
    return 0.6 + 0.01 * place + 0.02 * seed + 0.001 * ((7 * place + 3 * seed) % 5)


@pytest.fixture
def ours(tmp_path):
    """The later the method, the better."""
    seeds = range(SEEDS)
    per_seed = {key: [figures(place, seed) for seed in seeds] for place, key in enumerate(KEYS)}
    curves = {
        key: [{"epoch": [1.0, 2.0], "training_loss": [0.5, 0.4], "validation_score": [0.1, own]} for own in found]
        for key, found in per_seed.items()
    }
    relations = {key: [[[0, 1, 2], [1, 0, place], [2, place, 0]]] * SEEDS for place, key in enumerate(KEYS[3:6])}
    costs = {"hard_sharing": [{"seconds_per_step": 0.1}] * SEEDS, "m03": [{"seconds_per_step": 0.25}] * SEEDS}
    scores = {key: [{name: {"auc": own} for name in "xyz"} for own in found] for key, found in per_seed.items()}
    more = {"curves": curves, "relations": relations, "costs": costs, "scores": scores}
    return finished(tmp_path / "results.jsonl", per_seed, "auc", **more)


@pytest.fixture
def parsed(ours):
    return Parsed(page(ours, Origin("compare", "-", "-"), *COLUMNS, COMPARISON))


def test_rows(ours):
    titles, *rows = comparison_rows(ours, ours.settings[0], COLUMNS)
    assert titles == [
        *("method", "AUC %", "difference in AUC", "adjusted interval, AUC", "delta-m %", "step time", "tuned", "seeds"),
    ]
    assert [rows[0][0], rows[1][0], rows[-1][0]] == ["Hard sharing", "Method single_task", "Method constant"]
    by_name = {row[0]: dict(zip(titles, row)) for row in rows}
    low, high = adjusted_interval(ours, ours.settings[0], ours.methods["m03"], "auc")
    assert by_name["Method m03"]["adjusted interval, AUC"] == f"[{100 * low:+.2f}, {100 * high:+.2f}]"
    assert (by_name["Method m03"]["step time"], by_name["Method m04"]["step time"]) == ("2.50", "-")
    assert by_name["Method m03"]["delta-m %"].startswith("+")
    assert by_name["Method single_task"]["delta-m %"] == "-"


def test_files_have_the_same_numbers(ours, tmp_path):
    written = write_beside(tmp_path / "results.jsonl", ours, Origin("compare", "-", "-"), {}, COLUMNS, None, COMPARISON)
    assert not written.missing
    assert (tmp_path / "critical_differences.png").is_file()
    numbers = as_numbers(ours, COLUMNS[0], lambda one, method: further_figures(ours, one, method, COLUMNS))
    methods = json.loads(json.dumps(finite(numbers)))["settings"]["one"]["methods"]
    with (tmp_path / "results.csv").open() as file:
        lines = {line["method"]: line for line in csv.DictReader(file) if line["metric"] == "auc"}
    assert set(lines) == set(KEYS)
    for key, line in lines.items():
        known = methods[key]
        for column, value in (
            ("adjusted_low", known["adjusted"].get("auc", {}).get("low")),
            ("delta_m", known["delta_m"]["mean"]),
            ("step_time", known["costs"]["step"]),
        ):
            assert (float(line[column]) if line[column] else None) == value, (key, column)
    text = (tmp_path / "results.md").read_text()
    assert text.startswith(summary(ours, COLUMNS, COMPARISON))
    assert table_rows(text)[2:17] == [list(row) for row in comparison_rows(ours, ours.settings[0], COLUMNS)[1:16]]
    assert "### Published: CIFAR-MTL\n\nA paper, table 1\n\n| published | AUC | accuracy |" in text
    assert "| Ours | - | 95.8 |" in text
    assert "Mean ranks in AUC over 5 seeds" in text
    page_text = written.page.read_text()
    assert page_text.count("data:image/png;base64,") == 1


def test_page(ours, parsed):
    assert parsed.texts["strong"] == ["Yes."]
    titles, *rows = comparison_rows(ours, ours.settings[0], COLUMNS)
    assert [text for text in parsed.texts["th"] if text in titles] == titles
    assert parsed.texts["td"][: len(rows) * (len(titles) - 1)] == [
        cell.replace("+-", "\N{PLUS-MINUS SIGN}") for row in rows for cell in row[1:]
    ]
    assert parsed.texts["td"][-4:] == ["95.56", "-", "-", "95.8"], "published, in a table of their own"
    assert "Published: CIFAR-MTL" in parsed.texts["h3"]
    assert any(text.startswith("Mean ranks in AUC") for text in parsed.texts["p"])
    low, high = (100 * end for end in adjusted_interval(ours, ours.settings[0], ours.methods["m03"], "auc"))
    assert f"adjusted [{low:+.2f}, {high:+.2f}]" in parsed.texts["small"]


def test_of_many_curves_some_are_shown(ours, parsed):
    boxes = {own["data-line"]: "checked" in own for own in parsed.of("input") if own.get("type") == "checkbox"}
    lines = {own["data-line"]: own.get("class") != "off" for own in parsed.of("polyline")}
    assert boxes == lines
    shown = {KEYS[int(name.partition("-")[2])] for name, own in lines.items() if own}
    assert shown == {"hard_sharing", "m10", "m11", "m12", "m13"}, "the baseline and the best by validation"
    styles = [(own["stroke"], own["stroke-dasharray"]) for own in parsed.of("polyline")]
    assert len(set(styles)) == len(styles)


def test_relations_are_in_one_order(parsed):
    small = [own for own in parsed.of("canvas") if "data-of" in own]
    assert [own["data-of"] for own in small] == ["0", "1", "2"]
    assert {own["data-order"] for own in small} == {"0"}


def test_few_curves_need_no_boxes(tmp_path):
    ours = study(tmp_path / "results.jsonl")
    curves = {"epoch": [1.0, 2.0], "validation_score": [0.2, 0.6]}
    list(ours.run(in_turn, lambda cell: (cell, {**plain(cell), "curves": curves}, {"data": "abc"})))
    parsed = Parsed(page(ours, Origin("small", "-", "-"), ["accuracy"], ["accuracy"]))
    assert not parsed.of("input")
    assert not parsed.of("script")


def test_nothing_done_yet(tmp_path):
    ours = study(tmp_path / "none.jsonl", setting(methods=("hard_sharing", "srdml", "pcgrad")))
    parsed = Parsed(page(ours, Origin("compare", "-", "-"), *COLUMNS, COMPARISON))
    assert parsed.texts["strong"] == ["Not done."]
    assert "Not done. Setting one: nothing can be compared" in summary(ours, COLUMNS, Comparison())


def test_snapshot_is_the_study(ours):
    found, (one,) = Snapshot(ours), ours.settings
    assert (found.done, found.trainings) == (ours.done, ours.trainings)
    for method in ours.methods_of(one):
        for _ in range(2):
            assert found.chosen(one, method) == ours.chosen(one, method)
            assert found.reported(one, method) == ours.reported(one, method)
            for metrics, other in ((["auc"], None), (["auc", "nmse"], None), (["auc"], ours.methods["m03"])):
                one_way, another = (own.difference(one, method, metrics, other) for own in (found, ours))
                assert repr(one_way) == repr(another)
