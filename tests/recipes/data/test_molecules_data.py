"""Fingerprints against rdkit, and what a table of molecules gives."""

import math
from dataclasses import replace

import pytest
import torch

from recipes.data.molecules import (
    MoleculeTable,
    count_fingerprints,
    fingerprint,
    molecule_splits,
    read_molecules,
)
from recipes.runtime.errors import DataError, OptionError, need

from ..support.small_molecules import ASPIRIN, TASKS, UNREADABLE, rows_of_table, write_molecules

BITS = 256
SHARES = {"validation_share": 0.25, "test_share": 0.25}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return MoleculeTable(write_molecules(tmp_path_factory.mktemp("molecules") / "own.csv"), "structure")


def draw(table, **options):
    return molecule_splits(
        read_molecules(table, BITS), **{"seed": 0, "labels": 3, "labelled": "one", **SHARES, **options}
    )


class TestFingerprints:
    def test_counts_of_substructures_by_their_numbers_modulo_the_bits(self):
        texts = [ASPIRIN, "CCO", "c1ccccc1CCCCCCCC"]
        found, kept = count_fingerprints(texts, BITS)
        generator = need("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=2)
        expected = torch.zeros(len(texts), BITS, dtype=torch.float64)
        for row, text in enumerate(texts):
            unfolded = generator.GetSparseCountFingerprint(need("rdkit.Chem").MolFromSmiles(text))
            for number, count in unfolded.GetNonzeroElements().items():
                expected[row, number % BITS] += count
        assert kept == [0, 1, 2]
        assert expected.max() > 2, "counts, not bits"
        assert torch.allclose(found.double(), torch.log(1 + expected), atol=1e-6)

    def test_no_molecule_at_all(self, capfd):
        found, kept = count_fingerprints([UNREADABLE, "", "not a molecule"], BITS)
        assert found.shape == (0, BITS)
        assert kept == []
        assert capfd.readouterr().err == "", "rdkit's own messages are not shown"


class TestTable:
    def test_what_it_has(self, table):
        molecules = read_molecules(table, BITS)
        rows = rows_of_table()
        assert molecules.tasks == TASKS
        assert molecules.unreadable == {1: UNREADABLE}
        assert molecules.rows == (0, *range(2, len(rows)))
        assert molecules.inputs.shape == (len(rows) - 1, BITS)
        for row, own in zip(molecules.rows, molecules.labels.tolist()):
            expected = [math.nan if rows[row][task] == "" else float(rows[row][task]) for task in TASKS]
            assert own == pytest.approx(expected, nan_ok=True)
        assert set(molecules.left_out) == {"name", "mass", "empty"}
        assert molecules.left_out["empty"] == "all of its 0 labels are the same"
        assert "'mass' has the label" in molecules.left_out["mass"]

    def test_is_read_once(self, table):
        assert read_molecules(table, BITS) is read_molecules(replace(table), BITS)

    def test_tasks_by_name(self, table):
        assert read_molecules(replace(table, tasks=("long", "acid")), BITS).tasks == ("long", "acid")

    def test_other_marks_of_missing_labels(self, tmp_path):
        rows = [{**row, "acid": -1 if number % 5 == 4 else row["acid"]} for number, row in enumerate(rows_of_table())]
        own = MoleculeTable(write_molecules(tmp_path / "own.csv", rows), "structure")
        assert "acid" not in read_molecules(own, BITS).tasks
        marked = read_molecules(replace(own, missing=("-1",)), BITS)
        assert torch.isnan(marked.labels[:, 0]).tolist() == [row % 5 == 4 for row in marked.rows]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"smiles": "smiles"}, "has no column 'smiles'.*Pass the column of the molecules as --smiles"),
            ({"smiles": "mass"}, "rdkit can read none of the 63 molecules in the column 'mass'"),
            ({"tasks": ("acid", "toxic")}, "has no column 'toxic'"),
            ({"tasks": ("acid", "mass")}, "the task 'mass' of .* cannot be learned: column 'mass' has the label"),
            ({"tasks": ("acid",)}, r"has 1 column\(s\) of 0 and 1 that can be tasks, and relations need two"),
            ({"path": "nowhere.csv"}, "found no file nowhere.csv"),
        ],
    )
    def test_what_cannot_be_used(self, table, changes, message):
        with pytest.raises(DataError, match=message):
            read_molecules(replace(table, **changes), BITS)

    def test_fingerprint_of_the_data(self, table, tmp_path):
        tables = {"own": table, "other": MoleculeTable("nowhere.csv")}
        assert fingerprint(tables) == fingerprint({"own": table})
        assert fingerprint(tables) != fingerprint({"own": replace(table, tasks=("acid", "long"))})
        other = write_molecules(tmp_path / "own.csv", rows_of_table()[:-1])
        assert fingerprint(tables) != fingerprint({"own": replace(table, path=other)})
        with pytest.raises(DataError, match="found no file nowhere.csv"):
            fingerprint({"other": MoleculeTable("nowhere.csv")})


class TestSplits:
    def test_one_label_for_each_molecule(self, table):
        splits = draw(table, labels=5)
        known = ~torch.isnan(splits.train.labels)
        assert known.sum(0).tolist() == [5] * 4
        assert known.sum(1).tolist() == [1] * 20
        everything = read_molecules(table, BITS).labels
        rows = torch.tensor(splits.train.rows)
        assert torch.equal(splits.train.labels[known], everything[rows][known]), "labels are those of the table"
        for own in (splits.validation, splits.test):
            assert torch.equal(own.labels.nan_to_num(-1), everything[torch.tensor(own.rows)].nan_to_num(-1))

    def test_all_labels_of_some_molecules(self, table):
        splits = draw(table, labels=9, labelled="all")
        everything = read_molecules(table, BITS).labels[torch.tensor(splits.train.rows)]
        assert len(splits.train) == 9
        assert torch.equal(splits.train.labels.nan_to_num(-1), everything.nan_to_num(-1))

    @pytest.mark.parametrize("seed", range(20))
    def test_no_molecule_in_two_splits(self, table, seed):
        splits = draw(table, seed=seed)
        seen = [set(map(tuple, own.inputs.tolist())) for own in (splits.train, splits.validation, splits.test)]
        assert len(set.union(*seen)) == sum(map(len, seen))
        for own in (splits.validation, splits.test):
            assert all(len(set(column[~torch.isnan(column)].tolist())) == 2 for column in own.labels.unbind(1))

    def test_the_two_ways_to_write_ethanol_are_one_molecule(self, table):
        inputs = read_molecules(table, BITS).inputs
        same = [index for index, own in enumerate(inputs) if torch.equal(own, inputs[0])]
        assert same == [0, 7], "or the test above tests nothing"

    def test_seed_draws_the_rows_and_leaves_the_test(self, table):
        one, same, other = (draw(table, seed=seed) for seed in (0, 0, 1))
        assert one.train.rows == same.train.rows
        assert one.train.rows != other.train.rows
        assert one.validation.rows != other.validation.rows
        assert one.test.rows == other.test.rows

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"labels": 9}, r"9 labels for each of 4 tasks were asked for.*have only about \d+\. Use fewer"),
            ({"labels": 60, "labelled": "all"}, r"60 training molecules were asked for, but there are \d\d"),
            ({"labelled": "some"}, "found labelled='some'. Use one or all"),
            ({"test_share": 0.01}, "the task '.*' is too rare for both labels to be among them"),
        ],
    )
    def test_more_than_there_is(self, table, options, message):
        with pytest.raises(OptionError, match=message):
            draw(table, **options)
