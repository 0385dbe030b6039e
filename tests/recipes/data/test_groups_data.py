"""Tables of rows in groups: from frames and files to numbers, and the rows that a training sees."""

import re

import pandas
import pytest
import torch

from recipes.data.groups import SOURCES, file_digest, group_table, kept_groups, read_known, read_own, split_groups
from recipes.runtime.errors import DataError, OptionError


def frame(**columns):
    """Two groups of four and one of one; ``size`` is the same within groups."""
    return pandas.DataFrame(
        {
            "school": list("bbbbaaaac"),
            "score": [1.0, 2, 3, 4, 5, 6, 7, 8, 9],
            "iq": [3, 1, 4, 1, 5, 9, 2, 6, 5],
            "sex": list("mfmfmfmfm"),
            "kind": list("xxxxyyyyz"),
            "size": [4, 4, 4, 4, 5, 5, 5, 5, 1],
            **columns,
        }
    )


def table(inputs=(), **columns):
    return group_table(frame(**columns), "school", "score", inputs, "table.csv")


class TestTable:
    def test_texts_become_categories_but_the_first(self):
        found = table()
        assert found.inputs == ("iq", "sex=m", "kind=y", "kind=z", "size")
        assert found.names == ("a", "b", "c")
        assert found.groups.tolist() == [1] * 4 + [0] * 4 + [2]
        assert found.values[:, 1].tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]
        assert found.values[:, 3].tolist() == [0] * 8 + [1]
        assert found.targets.tolist() == list(range(1, 10))

    def test_what_varies_within_groups(self):
        assert table().within == (True, True, False, False, False)

    def test_constant_columns_are_left_out(self):
        found = table(year=1990, land="NL")
        assert found.left_out == ("year", "land")
        assert found.inputs == table().inputs

    def test_chosen_inputs(self):
        assert table(inputs=("size", "iq")).inputs == ("size", "iq")

    @pytest.mark.parametrize(
        ("columns", "inputs", "message"),
        [
            (
                {"iq": [3, 1, None, 1, 5, 9, 2, None, 5]},
                (),
                "column iq of table.csv is empty in 2 row(s), first in row 3",
            ),
            ({"score": [1, 2, 3, 4, "five", 6, 7, 8, 9]}, (), "column score of table.csv has 'five' in row 5"),
            ({"iq": [1.0] * 8 + [float("inf")]}, (), "column iq of table.csv has inf in row 9"),
            ({}, ("IQ",), "table.csv has no column 'IQ'. It has 'school', 'score', 'iq'"),
            ({}, ("iq", "score"), "have to be different columns"),
            ({"iq": [1.0] * 8 + [1e200]}, (), "column iq of table.csv has 1e+200 in row 9"),
            ({"score": [1e200] * 8 + [1.0]}, (), "column score of table.csv has 1e+200 in row 1"),
            ({"score": 0.1}, (), "column score of table.csv is 0.1 in all rows"),
            ({"sex=m": range(9)}, (), "two inputs of table.csv would be called sex=m"),
            ({"iq": 1}, ("iq",), "the inputs of table.csv are the same in all rows: iq"),
        ],
    )
    def test_cells_and_columns_that_cannot_be_used(self, columns, inputs, message):
        with pytest.raises(DataError, match=re.escape(message)):
            table(inputs, **columns)

    def test_names_are_no_categories(self):
        many = pandas.DataFrame({"g": range(30), "y": range(30), "name": [f"pupil {number}" for number in range(30)]})
        with pytest.raises(DataError, match="column name of it has 30 different texts, such as 'pupil 0'"):
            group_table(many, "g", "y", (), "it")

    def test_no_rows(self):
        with pytest.raises(DataError, match="it has no rows"):
            group_table(frame().iloc[:0], "school", "score", (), "it")


class TestFiles:
    @pytest.mark.parametrize("separator", [",", ";"])
    def test_csv(self, tmp_path, separator):
        path = tmp_path / "scores.csv"
        frame().to_csv(path, index=False, sep=separator)
        found = read_own(str(path), "school", "score", ())
        assert torch.equal(found.values, table().values)
        assert found.names == table().names

    def test_cells_are_as_they_are_written(self, tmp_path):
        path = tmp_path / "scores.csv"
        path.write_text("g,y,land\n001,1,NA\n001,2,DE\n1,3.5,NA\n1,4e0,DE\n", encoding="utf-8-sig")
        found = read_own(str(path), "g", "y", ())
        assert found.names == ("001", "1")
        assert found.inputs == ("land=NA",)
        assert found.values[:, 0].tolist() == [1, 0, 1, 0]
        assert found.targets.tolist() == [1, 2, 3.5, 4]

    def test_groups_with_numbers_are_in_their_order(self, tmp_path):
        path = tmp_path / "scores.csv"
        path.write_text("g,y,x\n10,1,1\n9,2,3\n", encoding="utf-8")
        assert read_own(str(path), "g", "y", ()).names == ("9", "10")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "cannot be read"),
            ("g,y,x\n", "has no rows"),
            ("g,y,x,x\na,1,2,3\n", "has the column 'x' twice"),
            ("g,y,x\na,1,2,3\nb,2,3,4\n", "cannot be read .*3 fields in line 2, saw 4"),
            ("g,y,x\na,1,2\nb,2\n", "column x of .* is empty in 1 row.s., first in row 2"),
            ("g,y,x\na,1,2\nb,2,NA\n", "column x of .* is empty in 1 row.s., first in row 2"),
            ("g,y,x\na,1,2\nb,NA,3\nb,x,3\n", "column y of .* has 'NA' in row 2"),
        ],
    )
    def test_files_that_would_be_misread(self, tmp_path, text, message):
        path = tmp_path / "scores.csv"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_own(str(path), "g", "y", ())

    def test_missing_file(self, tmp_path):
        for read in (lambda path: read_own(path, "school", "score", ()), file_digest):
            with pytest.raises(DataError, match="nowhere.csv"):
                read(str(tmp_path / "nowhere.csv"))

    def test_digest_is_of_the_content(self, tmp_path):
        one, other = tmp_path / "one.csv", tmp_path / "other.csv"
        one.write_text("a\n1\n")
        other.write_text("a\n2\n")
        assert file_digest(str(one)) != file_digest(str(other))

    @pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.item is not None])
    def test_known_tables_are_in_the_package(self, name):
        found = read_known(name, None)
        assert len(found.names) >= 60
        assert len(found.targets) == len(found.values) == len(found.groups) > 2000
        assert torch.isfinite(found.values).all()
        assert not found.left_out

    def test_school_needs_its_folder(self, tmp_path):
        with pytest.raises(DataError, match="Pass --data with the folder that has the folder school"):
            read_known("school", None)
        with pytest.raises(DataError, match="found no .*train.parquet"):
            read_known("school", str(tmp_path))


class TestSplit:
    @pytest.fixture
    def many(self):
        """Groups of 1 to 12 rows, whose targets are the numbers of the rows."""
        groups = [group for group in range(12) for _ in range(group + 1)]
        rows = range(len(groups))
        columns = {"g": groups, "y": [float(row) for row in rows], "x": [row % 7 for row in rows]}
        return group_table(pandas.DataFrame(columns), "g", "y", (), "it")

    def test_groups_with_few_rows_are_left_out(self, many):
        assert kept_groups(many, 6) == [8, 9, 10, 11]
        found = split_groups(many, rows=4, validation_rows=2, seed=0)
        assert found.names == ("8", "9", "10", "11")
        assert found.train.inputs.shape == (4, 4, 1)
        assert found.validation.targets.shape == (4, 2)
        assert torch.bincount(found.test_groups).tolist() == [3, 4, 5, 6]

    def test_every_row_once_and_with_its_group(self, many):
        found = split_groups(many, rows=4, validation_rows=2, seed=3)
        targets = many.targets[many.groups >= 8]
        drawn = torch.cat([found.train.targets.flatten(), found.validation.targets.flatten(), found.test_targets])
        scale = float(targets.std() / drawn.std())
        back = (drawn - drawn.mean()) * scale + targets.mean()
        assert torch.allclose(back.sort().values.double(), targets, atol=1e-3)
        groups = torch.cat(
            [torch.arange(4).repeat_interleave(4), torch.arange(4).repeat_interleave(2), found.test_groups]
        )
        assert [int(many.groups[round(row)]) - 8 for row in back.tolist()] == groups.tolist()
        assert found.variance == pytest.approx(float(drawn.var()), rel=1e-5)

    def test_units_are_those_of_the_training_rows(self, many):
        found = split_groups(many, rows=4, validation_rows=2, seed=1)
        for values in (found.train.inputs, found.train.targets):
            assert values.mean().item() == pytest.approx(0, abs=1e-6)
            assert values.std().item() == pytest.approx(1, abs=1e-6)

    def test_seed_decides(self, many):
        one, same, other = (split_groups(many, rows=4, validation_rows=2, seed=seed) for seed in (1, 1, 2))
        assert torch.equal(one.test_targets, same.test_targets)
        assert not torch.equal(one.test_targets, other.test_targets)

    def test_targets_of_the_training_rows_are_the_same(self):
        columns = {"g": [0] * 6 + [1] * 6 + [2], "y": [2.0] * 12 + [3.0], "x": range(13)}
        same = group_table(pandas.DataFrame(columns), "g", "y", (), "it")
        with pytest.raises(DataError, match="with seed 4 all 2 training rows have the target 2"):
            split_groups(same, rows=1, validation_rows=2, seed=4)

    def test_too_many_rows(self, many):
        with pytest.raises(OptionError, match="1 of 12 groups have so many: the second largest has 11. Use fewer rows"):
            split_groups(many, rows=7, validation_rows=2, seed=0)
