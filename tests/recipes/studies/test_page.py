"""The page of a study: complete in itself, with names that cannot break it, and the numbers of the study."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from recipes.runtime.figures import new_figure, save
from recipes.studies.page import Origin, page
from recipes.studies.tables import rows_of
from recipes.studies.verdicts import effect_of, verdicts
from recipes.studies.written import write_beside

from ..support.small_study import ABOUT, BASE, OURS, in_turn, setting, study

EVIL = '</script><img src="https://example.org/x.png" onerror=alert(1)>"&'
TASKS = (EVIL, "tall", "long", "wide")
RELATIONS = [[0, 1, 2, 6], [1, 0, 5, 1], [2, 5, 0, 1], [6, 1, 1, 0]]
#: Elements without an end.
_VOID = {"meta", "link", "img", "input"}


class Parsed(HTMLParser):
    """Tags with attributes and texts; fails on tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and text.strip():
            self.texts.setdefault(self.open[-1], []).append(text.strip())

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def train(cell):
    """Better with the penalty in each seed."""
    value = 0.5 + 0.02 * cell.seed - (0.05 + 0.01 * cell.seed if cell.method.rule else 0.0)
    curves = {"epoch": [1.0, 2.0, 3.0], "training_loss": [0.5, 0.4, 0.3], "validation_score": [0.2, 0.6, 0.7]}
    if cell.method.rule:
        curves["penalty_share"] = [0.0, 0.02, 0.2]
    return {
        "validation": 0.5,
        "macro": {"nmse": value} if cell.reported else {},
        "scores": {name: {} for name in TASKS},
        "curves": curves,
        "relations": RELATIONS if cell.method.rule else None,
    }


def trained(cell):
    about = {**ABOUT, "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": EVIL}, "machine": {"processor": EVIL}}
    return cell, train(cell), about


@pytest.fixture
def ours(tmp_path):
    found = study(tmp_path / "results.jsonl", setting(key=EVIL), setting("two"), seeds=6)
    list(found.run(in_turn, trained))
    return found


@pytest.fixture
def picture(tmp_path):
    figure, _ = new_figure(1.0, 1.0)
    save(figure, tmp_path / "shrinkage.png")
    return tmp_path / "shrinkage.png"


@pytest.fixture
def parsed(ours, picture):
    origin = Origin("small_study", EVIL, f"python -m recipes.small {EVIL}", [picture])
    return Parsed(page(ours, origin, ["nmse", "auc"], ["nmse", "auc"]))


def test_nothing_is_outside(parsed):
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "data", "action", "poster", "srcset", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert not any(re.search(r"url\(|@import", text) for text in parsed.texts["style"])
    (policy,) = [own["content"] for own in parsed.of("meta") if own.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert not any(source in policy for source in ("http", "*", "'self'"))


def test_names_are_text(parsed):
    assert len(parsed.of("script")) == 2
    assert EVIL in parsed.texts["p"]
    assert f"python -m recipes.small {EVIL}" in parsed.texts["code"]
    assert any(EVIL in text for text in parsed.texts["h3"])
    assert {EVIL, f"processor {EVIL}"} <= set(parsed.texts["dd"])


def test_verdicts_have_the_numbers_of_the_study(ours, parsed):
    said = [text for text in parsed.texts["span"] if " is " in text]
    assert said == [verdict.sentence for verdict in verdicts(ours, ["nmse"])]
    assert parsed.texts["strong"] == ["Helps.", "Helps."]
    base = sum(result["macro"]["nmse"] for result in ours.reported(ours.settings[1], BASE).values()) / 6
    difference = ours.difference(ours.settings[1], OURS, ["nmse"])["nmse"]
    mean, low, high = (abs(100 * value / base) for value in (difference.mean, difference.high, difference.low))
    assert f"is {mean:.1f} % below" in said[1]
    assert f"(95 % interval {low:.1f} to {high:.1f} %)" in said[1]


def test_tables_are_those_of_the_study(ours, parsed):
    cells = [cell.replace("+-", "\N{PLUS-MINUS SIGN}") for own in ours.settings for cell in _body(ours, own)]
    assert parsed.texts["td"] == cells
    assert not any("AUC" in text for text in parsed.texts["th"]), "a metric that no setting has"


def _body(ours, own):
    return [cell for row in rows_of(ours, own, ["nmse", "auc"], ["nmse", "auc"])[1:] for cell in row[1:]]


def test_differences_are_where_the_axis_says(ours, parsed):
    effect = effect_of(ours, ours.settings[1], OURS, "nmse")
    text = f"{effect.mean:+.1f} [{effect.low:+.1f}, {effect.high:+.1f}]"
    assert parsed.texts["span"].count(text) == 2
    circle = float(parsed.of("circle")[1]["cx"].rstrip("%"))
    dashed, bar = ([float(line[name].rstrip("%")) for name in ("x1", "x2")] for line in _marks(parsed)[-2:])
    # Three points and the zero, on one line.
    assert (circle - bar[0]) / (bar[1] - bar[0]) == pytest.approx(
        (effect.mean - effect.low) / (effect.high - effect.low), abs=0.01
    )
    assert (dashed[0] - bar[0]) / (bar[1] - bar[0]) == pytest.approx(-effect.low / (effect.high - effect.low), abs=0.01)


def _marks(parsed):
    return [line for line in parsed.of("line") if line.get("x1", "").endswith("%")]


def test_relations_are_relative_and_in_cluster_order(parsed):
    (text,) = [text for text in parsed.texts["script"] if text.startswith("[")]
    first, second = json.loads(text)
    assert first == second
    assert sorted(first["tasks"]) == sorted(TASKS)
    mean = sum(map(sum, RELATIONS)) / 12
    for a, row in zip(first["tasks"], first["weights"]):
        for b, weight in zip(first["tasks"], row):
            assert weight == pytest.approx(RELATIONS[TASKS.index(a)][TASKS.index(b)] / mean, abs=0.006)
    assert abs(first["tasks"].index(EVIL) - first["tasks"].index("wide")) == 1
    closest = f"{EVIL} \N{EN DASH} wide: {6 / mean:.2f}"
    assert parsed.texts["li"].count(closest) == 2
    assert parsed.texts["li"].index(closest) < parsed.texts["li"].index(f"tall \N{EN DASH} long: {5 / mean:.2f}")


def test_pictures_have_alternatives(parsed, picture):
    images = parsed.of("img")
    assert len(images) == 3, "two trees and the picture"
    assert all(image["alt"] for image in images)
    assert base64.b64decode(images[-1]["src"].partition(",")[2]) == picture.read_bytes()
    assert all(base64.b64decode(image["src"].partition(",")[2]).startswith(b"<?xml") for image in images[:-1])
    assert all(own.get("aria-label") or own.get("aria-hidden") for own in parsed.of("svg"))


def test_curves_have_the_share_where_it_is_above_0(parsed):
    lines = parsed.of("polyline")
    assert len(lines) == 6, "in each setting two scores and a share"
    assert [len(line["points"].split()) for line in lines[:3]] == [3, 3, 2]
    # 2 % and 20 %: the second is higher up.
    (_, first), (_, second) = (point.split(",") for point in lines[2]["points"].split())
    assert float(first) > float(second)


def test_picture_that_fails_is_named_and_the_rest_is_written(ours, tmp_path):
    def draw(study, folder):
        figure, axes = new_figure(1.0, 1.0)
        axes.set_title("cost in $ of _$")
        save(figure, folder / "cost.png")

    columns = (["nmse"], ["nmse"], ["nmse"])
    written = write_beside(tmp_path / "results.jsonl", ours, Origin("small", "-", "-"), {}, columns, draw)
    assert list(written.missing) == ["pictures"]
    assert written.missing["pictures"].startswith("ValueError: of _ ^ ParseSyntaxException")
    assert written.page.is_file()
    assert (tmp_path / "results.md").is_file()


def test_verdict_is_of_a_method_that_is_named(parsed):
    assert any("else SRDML, else the first with learned relations" in text for text in parsed.texts["p"])


def test_interval_is_told_to_be_narrow(parsed):
    assert any("too narrow for few seeds: about 85 % with 5" in text for text in parsed.texts["p"])


def test_what_is_not_done(tmp_path):
    """A page of nothing: no differences, relations and curves, and no crash."""
    text = page(study(tmp_path / "none.jsonl"), Origin("small", "-", "-"), ["nmse"], ["nmse"])
    parsed = Parsed(text)
    assert parsed.texts["strong"] == ["Not done."]
    assert not parsed.of("script")
    assert not parsed.of("circle")


def test_relations_of_a_training_that_diverged_are_left_out(tmp_path):
    def broken(cell):
        cell, result, about = trained(cell)
        if result["relations"] and cell.seed == 1:
            result["relations"] = [[None] * 4] * 4
        return cell, result, about

    ours = study(tmp_path / "results.jsonl", seeds=2)
    list(ours.run(in_turn, broken))
    parsed = Parsed(page(ours, Origin("small", "-", "-"), ["nmse"], ["nmse"]))
    assert any(text.endswith("SRDML, one seed") for text in parsed.texts["option"])
