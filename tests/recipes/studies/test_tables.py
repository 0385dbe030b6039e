"""Tables of a study, for people and for programs."""

import csv
import io
import json
import math

import pytest

from recipes.runtime.files import finite
from recipes.studies.tables import as_csv, as_numbers, markdown, tuning

from ..support.small_study import BASE, OURS, Trained, in_turn, plain, setting, study
from ..support.studies import table_rows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


class TestTables:
    @pytest.fixture
    def finished(self, path):
        ours = study(path)
        list(ours.run(in_turn, Trained(plain)))
        return ours

    def test_means_and_paired_differences(self, finished):
        (one,) = finished.settings
        for found, expected in (
            (finished.summary(one, BASE, ["accuracy"]), (0.6, 0.1)),
            (finished.summary(one, OURS, ["accuracy"]), (0.7, 0.15)),
            (finished.difference(one, OURS, ["accuracy"]), (0.1, 0.05)),
        ):
            assert (found["accuracy"].mean, found["accuracy"].std) == pytest.approx(expected)

    def test_markdown(self, finished):
        lines = markdown(finished, ["accuracy", "nmse"], ["accuracy"]).splitlines()
        assert lines == [
            "### Setting one",
            "",
            "| method | tuned | seeds | accuracy % | nMSE (lower is better) | difference in accuracy |",
            "| --- | --- | --- | --- | --- | --- |",
            "| Hard sharing | weight decay 0.5 | 3 | 60.00 +- 10.00 | 2.0000 +- 0.0000 | - |",
            "| SRDML | strength 0.01 | 3 | 70.00 +- 15.00 | 2.0000 +- 0.0000 | +10.00 +- 5.00 [+5.00, +15.00] |",
        ]

    def test_what_is_not_done_is_said(self, path):
        ours = study(path)
        list(ours.run(in_turn, Trained(plain, until=7)))
        base, entropic = markdown(ours, ["accuracy"], ["accuracy"]).splitlines()[-2:]
        assert base == "| Hard sharing | weight decay 0.5 | 0 of 3 | - | - |"
        assert entropic == "| SRDML | not done | 0 of 3 | - | - |"
        list(ours.run(in_turn, Trained(plain, until=4)))
        base, entropic = markdown(ours, ["accuracy"], ["accuracy"]).splitlines()[-2:]
        assert base == "| Hard sharing | weight decay 0.5 | 2 of 3 | 55.00 +- 7.07 | - |"
        assert entropic == "| SRDML | strength 0.01 | 1 of 3 | 55.00 | +5.00 |"

    def test_training_that_diverged_has_no_mean_and_no_crash(self, path):
        def train(cell):
            broken = cell.reported and cell.method is OURS and cell.seed == 1
            return {"validation": None, "macro": {"accuracy": math.nan}} if broken else plain(cell)

        ours = study(path)
        list(ours.run(in_turn, Trained(train)))
        line = markdown(ours, ["accuracy"], ["accuracy"]).splitlines()[-1]
        assert line == "| SRDML | strength 0.01 | 3 | - | - |"


class TestAgreement:
    """The same numbers for people, for programs, and in results.json."""

    METRICS = ("accuracy", "nmse")

    @pytest.fixture(params=[math.inf, 13, 11, 7, 0], ids=lambda until: f"{until} trainings")
    def some(self, path, request):
        ours = study(path, setting(), setting("two", methods=("srdml_cosine", "srdml", "hard_sharing")))
        list(ours.run(in_turn, Trained(plain, until=request.param)))
        return ours

    def test_csv_is_what_results_json_says(self, some):
        numbers = json.loads(json.dumps(finite(as_numbers(some, self.METRICS))))
        lines = list(csv.DictReader(io.StringIO(as_csv(some, self.METRICS))))
        found = {(line["setting"], line["method"], line["metric"]): line for line in lines}
        assert len(found) == len(lines)
        expected = 0
        for key, setting_ in numbers["settings"].items():
            for name, method in setting_["methods"].items():
                for metric, summary in method["summary"].items():
                    expected += 1
                    line = found[key, name, metric]
                    assert float(line["tuned"]) == method["chosen"]
                    assert int(line["seeds"]) == len(method["per_seed"])
                    given = {
                        **summary,
                        **{f"difference_{own}": x for own, x in method["difference"].get(metric, {}).items()},
                    }
                    for column, value in line.items():
                        if column in ("mean", "std", "low", "high") or column.startswith("difference_"):
                            assert (float(value) if value else None) == given.get(column), column
        assert len(lines) == expected

    def test_markdown_is_what_results_json_says(self, some):
        numbers = as_numbers(some, self.METRICS)
        rows = iter(table_rows(markdown(some, self.METRICS, ["accuracy"])))
        for setting_ in numbers["settings"].values():
            next(rows), next(rows)
            for method in setting_["methods"].values():
                label, tuned, seeds, accuracy, nmse, difference = next(rows)
                assert label == method["label"]
                assert tuned == (
                    "not done"
                    if method["chosen"] is None
                    else f"{method['parameter'].split(',')[0]} {method['chosen']:g}"
                )
                done = len(method["per_seed"])
                assert seeds == ("3" if done == 3 else f"{done} of 3")
                for text, own, factor in (
                    (accuracy, method["summary"].get("accuracy"), 100),
                    (nmse, method["summary"].get("nmse"), 1),
                    (difference, method["difference"].get("accuracy"), 100),
                ):
                    if own is None:
                        assert text == "-"
                        continue
                    parts = text.replace("+- ", "").replace("[", "").replace("]", "").replace(",", "").split()
                    known = [own["mean"], own["std"], *((own["low"], own["high"]) if text is difference else ())]
                    given = [factor * value for value in known if not math.isnan(value)]
                    assert [float(part) for part in parts] == pytest.approx(
                        given, abs=0.0051 if factor > 1 else 0.000051
                    )
        assert next(rows, None) is None

    def test_trials_are_told_with_what_was_chosen(self, some):
        numbers = as_numbers(some, self.METRICS)
        rows = [row for row in table_rows(tuning(some)) if row[0] not in ("method", "---")]
        methods = [method for setting_ in numbers["settings"].values() for method in setting_["methods"].values()]
        for (label, parameter, chosen, trials), method in zip(rows, methods, strict=True):
            assert (label, parameter) == (method["label"], method["parameter"])
            assert chosen == ("not done" if method["chosen"] is None else f"{method['chosen']:g}")
            text = ", ".join(f"{trial['value']:g}: {trial['validation']:.4f}" for trial in method["trials"])
            assert trials == (text or "-")

    def test_without_the_baseline_nothing_is_compared(self, path):
        ours = study(path, setting(methods=("srdml",)))
        list(ours.run(in_turn, Trained(plain)))
        assert "difference" not in markdown(ours, ["accuracy"], ["accuracy"])
        (line,) = csv.DictReader(io.StringIO(as_csv(ours, ["accuracy"])))
        assert line["difference_mean"] == ""
        assert as_numbers(ours, ["accuracy"])["settings"]["one"]["methods"]["srdml"]["difference"] == {}
