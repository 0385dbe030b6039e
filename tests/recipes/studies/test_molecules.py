"""``recipes.molecules``: a whole tiny study on molecules of one's own, its trivial models, and what it refuses."""

import json
import math
import sys

import pytest
import torch

from recipes import molecules
from recipes.data.molecules import MoleculeTable
from recipes.models.linear_heads import LinearHeads, PooledHead, SeparateLinearHeads
from recipes.studies.molecule_cells import MOLECULE_METHODS, train_molecules
from recipes.studies.study import Cell, Setting

from ..support.commands import call
from ..support.small_molecules import TASKS, UNREADABLE, write_molecules
from ..support.studies import results_json, results_of, size_of_png, table_rows

TINY = (
    *("--smiles", "structure", "--labels", "4", "--bits", "64", "--epochs", "2", "--validation-share", "0.25"),
    *("--weight-decays", "0", "1", "--shares", "0.1", "1", "--seeds", "2", "--tuning-seeds", "1", "--workers", "1"),
)


VALUES = {
    "data": "own",
    "labels": 4,
    "labelled": "one",
    "validation_share": 0.25,
    "test_share": 0.25,
    "bits": 64,
    "widths": [8, 4],
    "activation": "gelu",
    "epochs": 2,
    "steps_of_epoch": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "penalty": "share",
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_molecules(tmp_path_factory.mktemp("molecules") / "mine.csv")


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory):
    """Folder and printed text of a whole study."""
    folder = tmp_path_factory.mktemp("study")
    answer = call(molecules.main, "--table", table, *TINY, "--out", folder)
    assert answer.code == 0, answer.err
    return folder, answer.out


def test_any_name_can_be_that_of_a_task():
    tasks = ("pIC50.5", "type", "keys")
    model = SeparateLinearHeads(2, tasks, (3,), "gelu")
    found = model(torch.ones(4, 2))
    assert tuple(found) == tasks
    for ([task], network), own in zip(model.parts(), tasks):
        assert task == own
        assert torch.equal(network(torch.ones(4, 2)).squeeze(1), found[task])


class TestCommand:
    def test_tables_and_pictures(self, finished):
        folder, printed = finished
        rows = {row[0]: row for row in table_rows(printed)}
        assert list(rows)[2:] == [MOLECULE_METHODS[key].label for key in molecules.METHODS]
        assert "### mine, 4 labels per assay" in printed
        assert rows["Constant"][3:] == ["50.00 +- 0.00", "50.00 +- 0.00", rows["Constant"][5]]
        tuned = len(molecules.METHODS) - 2  # but for the constant and the defaults
        assert f"{2 * tuned + 2 * len(molecules.METHODS)} of" in printed
        for name in ("gains.png", "relations_srdml_cosine.png", "relations_srdml_default.png"):
            assert min(size_of_png(folder / name)) > 300

    def test_what_is_left_out_is_named(self, finished):
        _, printed = finished
        assert f"Left out, since rdkit cannot read them: row 1 ({UNREADABLE!r})." in printed
        assert "Columns that are no tasks: " in printed
        assert "column 'mass' has the label" in printed
        assert "4 tasks; 16 training molecules with 16 labels, " in printed

    def test_results_are_short_and_of_this_study(self, finished):
        folder, _ = finished
        for line in (folder / "results.jsonl").read_text().splitlines():
            entry = json.loads(line)
            assert set(entry["result"]) == {"best_epoch", "validation", "macro", "scores", "relations"}
            reported, rule = entry["cell"]["reported"], entry["cell"]["rule"]
            assert bool(entry["result"]["scores"]) == reported, "trials do not see the test split"
            assert bool(entry["result"]["relations"]) == (reported and rule not in (None, "fixed"))
            assert all(list(own) == ["auc"] for own in entry["result"]["scores"].values())

    def test_penalties_have_the_decay_of_the_baseline(self, finished):
        folder, _ = finished
        own = results_json(folder)["settings"]["own-4"]
        decay = own["methods"]["hard_sharing"]["chosen"]
        cells = [json.loads(line)["cell"] for line in (folder / "results.jsonl").read_text().splitlines()]
        assert {cell["weight_decay"] for cell in cells if cell["rule"]} == {decay}

    def test_nothing_is_trained_twice(self, table, finished):
        folder, printed = finished
        before = results_of(folder / "results.jsonl")
        again = call(molecules.main, "--table", table, *TINY, "--out", folder)
        assert again.code == 0
        assert results_of(folder / "results.jsonl") == before
        assert table_rows(again.out) == table_rows(printed)

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--data", "folder"], 2, "argument --table: stands in place of --data"),
            (["--shares", "1"], 2, "2 --weight-decays and 1 --shares. Use as many of the one as of the other"),
            (["--smiles", "smiles"], 1, "has no column 'smiles'"),
            (["--labels", "4", "40"], 1, "40 labels for each of 4 tasks were asked for, each of another molecule"),
            (["--methods", "pooling"], 2, "Did you mean pooled?"),
            (["--settings", "tox21-50"], 2, "found 'tox21-50'. Use some of own-4"),
        ],
    )
    def test_bad_options(self, table, tmp_path, arguments, code, message):
        answer = call(molecules.main, "--table", table, *TINY, "--out", tmp_path, *arguments)
        assert answer.code == code
        assert message in answer.complaint
        assert "Traceback" not in answer.err
        assert not (tmp_path / "results.jsonl").exists()

    def test_options_of_a_table_need_one(self, tmp_path):
        answer = call(molecules.main, "--tasks", "acid", "--out", tmp_path)
        assert answer.code == 2
        assert "of a --table of your own" in answer.complaint
        nothing = call(molecules.main, "--out", tmp_path)
        assert "Use folder that has tox21.parquet and sider.parquet; or pass a --table" in nothing.complaint

    def test_without_rdkit(self, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "rdkit", None)
        assert molecules.main(["--minutes", "0"]) == 1
        told = capsys.readouterr().err
        assert "error: this recipe needs rdkit" in told
        assert told.endswith('Run: pip install "saliency-reg[molecules]"\n')


class TestSettings:
    def settings(self, *arguments):
        parser = molecules.COMMAND._parser()
        return molecules.COMMAND.settings_of(parser.parse_args(list(arguments)))

    def test_published_ones(self):
        assert list(self.settings()) == ["tox21-50", "tox21-150", "sider-25", "sider-100-all"]

    def test_other_numbers_of_labels(self):
        found = self.settings("--labels", "25", "300", "--labelled", "one")
        assert list(found) == ["tox21-25", "tox21-300", "sider-25", "sider-300"]
        published = self.settings()["sider-25"]
        assert found["sider-25"].values == published.values, "results are found again"


class TestCell:
    def cell(self, key, reported=True, value=1.0, **values):
        setting = Setting("own-4", "Own", {**VALUES, **values}, (key,))
        return Cell(setting, MOLECULE_METHODS[key], value, 0, reported)

    def trained(self, table, tmp_path, *arguments, **options):
        data = {"own": MoleculeTable(table, "structure")}
        return train_molecules(self.cell(*arguments, **options), data, tmp_path).to_dict()

    def test_constant(self, table, tmp_path):
        found = self.trained(table, tmp_path, "constant")
        assert found["validation"] == found["macro"]["auc"] == 0.5
        assert {own["auc"] for own in found["scores"].values()} == {0.5}

    def test_pcgrad_at_the_feature_never_acts_where_each_molecule_has_one_label(self, table, tmp_path):
        """The gradients of two tasks are of different molecules, and so never in conflict: docs/molecules.md says so."""
        plain, surgery = (self.trained(table, tmp_path / key, key) for key in ("hard_sharing", "pcgrad"))
        assert plain["scores"] == surgery["scores"]
        all_labels = {"labels": 12, "labelled": "all"}
        plain, surgery = (
            self.trained(table, tmp_path / f"{key} all", key, **all_labels) for key in ("hard_sharing", "pcgrad")
        )
        assert plain["scores"] != surgery["scores"], "or the test above tests nothing"

    def test_mean_over_the_tasks_that_can_be_learned(self, table, tmp_path):
        # One label has no other kind beside it: no task can be learned.
        assert math.isnan(self.trained(table, tmp_path / "1", "hard_sharing", labels=1)["macro"]["auc_learnable"])
        found = self.trained(table, tmp_path, "hard_sharing", labels=12, labelled="all")
        mean = sum(own["auc"] for own in found["scores"].values()) / len(TASKS)
        assert found["macro"]["auc_learnable"] == found["macro"]["auc"] == pytest.approx(mean)


class TestNetworks:
    INPUTS = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))

    def test_one_pooled_head_differs_in_its_intercepts_alone(self):
        network = PooledHead(5, TASKS, (6, 4), "gelu")
        torch.nn.init.normal_(network.intercepts)
        outputs = network(self.INPUTS)
        plain = outputs["acid"] - network.intercepts[0]
        for number, task in enumerate(TASKS):
            assert torch.allclose(outputs[task] - network.intercepts[number], plain, atol=1e-6)

    @pytest.mark.parametrize("kind", [LinearHeads, SeparateLinearHeads])
    def test_layers(self, kind):
        network = kind(5, TASKS, (6, 4), "tanh").double()
        found = network(self.INPUTS.double())
        for number, task in enumerate(TASKS):
            if kind is LinearHeads:
                hidden, weight, bias = network.backbone, network.heads.weight[number], network.heads.bias[number]
            else:
                hidden, head = network.networks[number]
                weight, bias = head.weight[0], head.bias[0]
            first, second = hidden[0], hidden[2]
            inner = torch.tanh(
                torch.tanh(self.INPUTS.double() @ first.weight.T + first.bias) @ second.weight.T + second.bias
            )
            assert torch.allclose(found[task], inner @ weight + bias, atol=1e-12)

    def test_separate_ones_share_nothing(self):
        network = SeparateLinearHeads(5, TASKS, (6, 4), "gelu")
        parts = network.parts()
        assert [tasks for tasks, _ in parts] == [[task] for task in TASKS]
        assert len({id(own) for _, part in parts for own in part.parameters()}) == len(list(network.parameters()))
