"""The regret of the defaults, on results that are laid out by hand."""

import dataclasses
import math

import pytest

from recipes import defaults, groups
from recipes.runtime.files import finite
from recipes.studies.command import StudyCommand
from recipes.studies.regret import Regret, Source, _is_rival
from recipes.studies.regret_table import regret_table
from recipes.studies.results_file import ResultsFile
from recipes.studies.study import Study
from recipes.studies.tables import LEGEND

from ..support.commands import ROOT, call
from ..support.small_study import Trained, in_turn, setting
from ..support.studies import table_rows

#: What a seed is worth in every method, and by how much it changes a difference: means of 0 over five seeds.
SEEDS = (0.01, -0.02, 0.03, -0.01, -0.01, 5.0)
JITTER = (0.001, -0.001, 0.002, -0.002, 0.0, 7.0)
#: Of the metric, over five seeds.
BASE = {"nmse": 0.4, "rmse": 0.5, "auc": 0.9}
VALIDATION = {"hard_sharing": 0.9, "srdml": 0.8, "srdml_cosine": 0.7, "srdml+pcgrad": 0.95}


def formula(differences, metric):
    """Trainings whose test metric is the baseline's, so much changed; the second value of each grid validates best."""

    def train(cell):
        validation = VALIDATION.get(cell.method.key, 0.1) + 0.01 * (cell.value in (0.5, 0.1, 1.0))
        change = differences[cell.method.key]
        jitter = JITTER[cell.seed % 1000] if cell.method.rule else 0.0
        macro = {metric: finite(BASE[metric] + SEEDS[cell.seed % 1000] + change + jitter)}
        return {"validation": validation, "macro": macro if cell.reported else {}}

    return train


class MadeUp:
    """A study with a setting for each entry, and its results."""

    def __init__(self, path, metric="nmse", seeds=5):
        self.path = path
        self.metric = metric
        self.seeds = seeds
        self.settings = {}

    def add(self, key, seeds=None, **differences):
        own = self.settings[key] = setting(key)
        reported = dataclasses.replace(own, methods=tuple(differences))
        results = ResultsFile(self.path)
        study = Study([reported], range(self.seeds if seeds is None else seeds), (1000, 1001), results)
        list(study.run(in_turn, Trained(formula(differences, self.metric))))

    @property
    def source(self):
        metrics = (self.metric,)
        return Source(
            StudyCommand("made_up", "", self.settings, metrics, metrics, train=None, seeds=self.seeds),
            title="Made up: ",
        )

    def read(self):
        regret = Regret()
        regret.read(self.source, self.path)
        return regret


@pytest.fixture
def made_up(tmp_path):
    return MadeUp(tmp_path / "made_up.jsonl")


class TestRows:
    def test_share_of_the_gain(self, made_up):
        made_up.add("much", hard_sharing=0.0, srdml=-0.1, srdml_default=-0.08)
        made_up.add("little", hard_sharing=0.0, srdml=-0.1, srdml_default=-0.074)
        made_up.add("more", hard_sharing=0.0, srdml=-0.1, srdml_default=-0.12)
        much, little, more = made_up.read().rows
        assert [row.gains for row in (much, little, more)] == [True] * 3
        assert [row.kept for row in (much, little, more)] == pytest.approx([80.0, 74.0, 120.0])
        assert [row.better() for row in (much, little, more)] == pytest.approx([20.0, 18.5, 30.0])
        assert [row.holds() for row in (much, little, more)] == [True, False, True]
        assert (much.label, much.metric, much.seeds, much.planned) == ("Made up: Setting much", "nmse", 5, 5)
        assert much.baseline.summary.mean == pytest.approx(0.4)
        assert much.tuned.difference.mean == pytest.approx(-0.1)

    def test_where_tuning_gains_nothing(self, made_up):
        made_up.add("unclear", hard_sharing=0.0, srdml=-0.0005, srdml_default=0.0032)
        made_up.add("worse", hard_sharing=0.0, srdml=0.2, srdml_default=0.0048)
        made_up.add("better", hard_sharing=0.0, srdml=0.2, srdml_default=-0.3)
        rows = made_up.read().rows
        assert [row.gains for row in rows] == [False] * 3
        assert [row.better() for row in rows] == pytest.approx([-0.8, -1.2, 75.0])
        assert [row.holds() for row in rows] == [True, False, True]
        assert [row.better(of_error=True) for row in rows] == [row.better() for row in rows], "it is an error"

    def test_metric_that_is_better_the_higher_it_is(self, tmp_path):
        made_up = MadeUp(tmp_path / "made_up.jsonl", metric="auc")
        made_up.add("gain", hard_sharing=0.0, srdml=0.02, srdml_default=0.01)
        made_up.add("loss", hard_sharing=0.0, srdml=-0.02, srdml_default=-0.0045)
        gain, loss = made_up.read().rows
        assert (gain.gains, loss.gains) == (True, False)
        assert gain.kept == pytest.approx(50.0)
        assert (gain.better(), gain.better(of_error=True)) == pytest.approx((100 / 90, 10.0))
        assert (loss.better(), loss.better(of_error=True)) == pytest.approx((-0.5, -4.5))
        assert (loss.holds(), loss.holds(of_error=True)) == (True, False)

    def test_the_tuned_method_is_chosen_on_validation(self, made_up):
        """Neither the best on test, nor one with surgery, nor one that is not tuned."""
        changes = {"srdml+pcgrad": -0.3, "srdml_default": -0.08}
        made_up.add("one", hard_sharing=0.0, srdml_cosine=-0.2, srdml=-0.1, **changes)
        (row,) = made_up.read().rows
        assert (row.tuned.label, row.tried) == ("SRDML", 2)
        assert row.kept == pytest.approx(80.0)

    def test_mean_regularised_is_no_srdml(self):
        methods = groups.METHODS
        rivals = {key for key, own in methods.items() if _is_rival(own, methods["srdml_default"])}
        assert rivals == {key for key in methods if key.startswith("srdml")} - {"srdml_default"}

    def test_only_seeds_that_all_three_have(self, tmp_path):
        made_up = MadeUp(tmp_path / "made_up.jsonl", seeds=6)
        made_up.add("one", hard_sharing=0.0, srdml=-0.1)
        made_up.add("one", seeds=5, hard_sharing=0.0, srdml_default=-0.08)
        (row,) = made_up.read().rows
        assert (row.seeds, row.planned) == (5, 6)
        assert row.baseline.summary.mean == pytest.approx(0.4), "the sixth seed is worth 5"
        assert row.kept == pytest.approx(80.0)

    def test_too_few_seeds_for_an_interval(self, made_up):
        made_up.add("one", seeds=4, hard_sharing=0.0, srdml=-0.1, srdml_default=0.3)
        regret = made_up.read()
        assert regret.rows[0].holds() is None
        text = regret_table(regret)
        assert "holds on 0 of 0 sets" in text
        assert "Not judged, with less than 5 seeds: Made up: Setting one." in text

    def test_a_training_that_diverged_breaks_the_rule(self, made_up):
        made_up.add("gain", hard_sharing=0.0, srdml=-0.1, srdml_default=math.nan)
        made_up.add("none", hard_sharing=0.0, srdml=0.1, srdml_default=math.nan)
        made_up.add("tuned", hard_sharing=0.0, srdml=math.nan, srdml_default=0.0)
        regret = made_up.read()
        assert [row.holds() for row in regret.rows] == [False, False, True]
        assert "diverged" in regret_table(regret)


class TestLeftOut:
    def test_methods_that_are_missing(self, made_up):
        made_up.add("base", hard_sharing=0.0)
        made_up.add("tuned", hard_sharing=0.0, srdml=-0.1)
        made_up.add("untuned", hard_sharing=0.0, srdml_default=-0.1)
        made_up.add("surgery", hard_sharing=0.0, srdml_default=-0.1, **{"srdml+pcgrad": -0.1})
        regret = made_up.read()
        assert not regret.rows
        assert regret.left_out == {
            "without a result of SRDML, not tuned and tuned SRDML": ["Made up: Setting base"],
            "without a result of SRDML, not tuned": ["Made up: Setting tuned"],
            "without a result of tuned SRDML": ["Made up: Setting untuned", "Made up: Setting surgery"],
        }
        text = regret_table(regret)
        assert text.startswith("No setting has all it takes.\n\nLeft out, without")
        assert "Left out, without a result of SRDML, not tuned: Made up: Setting tuned." in text

    def test_a_study_without_a_file(self, made_up):
        assert made_up.read().left_out == {"no file of results": ["made_up.jsonl"]}


class TestTable:
    def test_rows(self, made_up):
        made_up.add("much", hard_sharing=0.0, srdml=-0.1, srdml_default=-0.08)
        made_up.add("worse", hard_sharing=0.0, srdml=0.2, srdml_default=0.0048)
        text = regret_table(made_up.read())
        _, _, *rows = table_rows(text)
        # Of seeds plus jitter: sqrt((0.011**2 + 0.021**2 + 0.032**2 + 0.012**2 + 0.01**2) / 4) = 0.0214
        assert [cell.partition(" [")[0] for cell in rows[0]] == [
            "Made up: Setting much",
            "nMSE",
            "5",
            "Hard sharing: 0.4000 +- 0.0200",
            "SRDML (of 1): 0.3000 +- 0.0214",
            "-0.1000 +- 0.0016",
            "0.3200 +- 0.0214",
            "-0.0800 +- 0.0016",
            "80.0 % of the gain kept",
            "20.00 % better",
            "holds",
        ]
        assert rows[1][-3:] == ["no clear tuned gain", "1.20 % worse", "broken"]
        assert "holds on 1 of 2 sets, and on 1 where" in text
        assert "Broken by: Made up: Setting worse (1.20 % worse)." in text
        assert "clear of 0 on 1 of 2 sets: Made up: Setting much." in text

    def test_a_gain_that_is_lost(self, made_up):
        made_up.add("lost", hard_sharing=0.0, srdml=-0.1, srdml_default=0.01)
        text = regret_table(made_up.read())
        assert table_rows(text)[2][-3:] == ["none of the gain kept", "2.50 % worse", "broken"]
        assert "Broken by: Made up: Setting lost (none of the gain kept)." in text

    def test_auc_is_told_by_what_it_lacks_of_one_too(self, tmp_path):
        made_up = MadeUp(tmp_path / "made_up.jsonl", metric="auc")
        made_up.add("loss", hard_sharing=0.0, srdml=-0.02, srdml_default=-0.0045)
        text = regret_table(made_up.read())
        assert table_rows(text)[2][-2:] == ["0.50 % worse (4.50 % of 1 - AUC)", "broken in 1 - AUC alone"]
        assert "holds on 1 of 1 sets, and on 0 where" in text
        assert "Broken by: Made up: Setting loss (0.50 % worse (4.50 % of 1 - AUC))." in text


def fill(folder, number, key, trained):
    """Results of one setting of a published study, under the options that its source names."""
    source = defaults.SOURCES[number]
    command = source.command
    options = command.options_of(source.arguments)
    own = command.settings_of(options)[key]
    baseline = source.baseline or command.baseline
    methods = tuple(trained["differences"])
    path = folder / f"{command.name}.jsonl"
    seeds, tuning_seeds = range(5), range(1000, 1000 + options.tuning_seeds)
    study = Study(
        [dataclasses.replace(own, methods=methods)], seeds, tuning_seeds, ResultsFile(path), command.methods, baseline
    )
    list(study.run(in_turn, Trained(formula(**trained))))


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path):
        gain = {"srdml": -0.1, "srdml_default": -0.08}
        fill(tmp_path, 0, "exam-20", {"metric": "nmse", "differences": {"hard_sharing": 0.0, "pooled": -0.3, **gain}})
        loss = {"hard_sharing": 0.0, "srdml": -0.1, "srdml_default": -0.0045}
        fill(tmp_path, 5, "all-labels", {"metric": "auc", "differences": loss})
        fill(tmp_path, 4, "classes-500-gelu", {"metric": "auc", "differences": {"hard_sharing": 0.0, "srdml": 0.1}})
        return tmp_path

    def test_published_studies(self, folder):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        answer = call(defaults.main, "--results", folder, "--out", folder / "table.md")
        assert answer.code == 0, answer.err
        rows = {row[0]: row[1:] for row in table_rows(answer.out)[2:4]}
        exam = "London schools, examination, 20 rows of each group"
        texts = "GoEmotions, 8,000 training texts, all labels"
        assert (rows[exam][1], rows[exam][-3], rows[exam][-1]) == ("5 of 10", "80.0 % of the gain kept", "holds")
        assert rows[texts][-2:] == ["0.50 % worse (4.50 % of 1 - AUC)", "broken in 1 - AUC alone"]
        (pooled,) = [row for row in table_rows(answer.out) if row[1] == "One head, intercept per group"]
        assert pooled[0] == exam
        assert pooled[2].startswith("0.1000 +- ")
        assert pooled[3].startswith("-0.3000 +- ")
        for left_out in ("CIFAR-10, 500 training images, GELU heads", "London schools, examination, 10 rows", "digits"):
            assert left_out in answer.out.partition("Left out")[2]
        assert answer.out == (folder / "table.md").read_text(encoding="utf-8")
        assert answer.out.endswith(f"{LEGEND}\n")
        (folder / "table.md").unlink()
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}, "who only reads changes nothing"

    def test_the_results_that_come_with_the_repository(self):
        before = sorted((ROOT / "docs" / "results").iterdir())
        answer = call(defaults.main)
        assert answer.code == 0, answer.err
        assert "SARCOS, 30 rows" in answer.out
        assert sorted((ROOT / "docs" / "results").iterdir()) == before

    def test_folder_without_results(self, tmp_path):
        answer = call(defaults.main, "--results", tmp_path)
        assert answer.code == 2
        assert f"{tmp_path} has no results of a study. Pass a folder with groups.jsonl" in answer.complaint

    def test_file_that_has_something_else(self, folder):
        (folder / "digits.jsonl").write_text("no result\n", encoding="utf-8")
        answer = call(defaults.main, "--results", folder)
        assert answer.code == 1
        assert "is no result" in answer.err

    def test_out_that_cannot_be_written(self, folder):
        answer = call(defaults.main, "--results", folder, "--out", folder / "nowhere" / "table.md")
        assert answer.code == 2
        assert "argument --out: cannot write" in answer.complaint
        assert "The rule" in answer.out, "the table is there all the same"

    def test_synthetic_is_compared_without_a_shared_layer(self, tmp_path):
        changes = {"single_task": 0.0, "srdml": -0.1, "srdml_default": -0.08, "hard_sharing": -0.2}
        changes["srdml_shared_layer"] = -0.3
        fill(tmp_path, 6, "synthetic", {"metric": "rmse", "differences": changes})
        regret = Regret()
        regret.read(defaults.SOURCES[6], tmp_path / "synthetic.jsonl")
        (row,) = regret.rows
        assert row.baseline.label == "Single-task, early stopping"
        assert (row.tuned.label, row.tried) == ("SRDML, l1, entropic", 1)
        assert row.kept == pytest.approx(80.0)
        assert [own.label for own in row.beside] == ["Shared layer, hard sharing"]
