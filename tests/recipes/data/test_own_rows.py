"""Rows of a table of one's own: columns, features, labels and splits."""

import csv

import numpy as np
import pytest
import torch

from recipes.data.own_rows.features import read_features
from recipes.data.own_rows.rows import LEAST_ROWS, Columns, read_rows
from recipes.data.own_table import read_frame
from recipes.runtime.errors import DataError
from tests.recipes.support.own_tables import ROWS, breast_cancer, described, digit_images, write


def rows_of(path, **columns):
    return read_rows(Columns(str(path), **columns))


def table(path, columns, rows=60):
    """Rows with these columns, each a function of the number of the row."""
    return write(path, [{name: make(row) for name, make in columns.items()} for row in range(rows)])


PLAIN = {
    "x": lambda row: str(row * 0.5),
    "a": lambda row: str(row % 2),
    "b": lambda row: str(row // 3 % 2),
}


class TestForms:
    def test_features(self, tmp_path):
        path, features, labels = breast_cancer(tmp_path / "cells.csv")
        own = rows_of(path, features=tuple(features))
        assert own.form == "features"
        assert list(own.kinds) == labels
        assert len(own) == ROWS
        assert own.inputs.names == tuple(features)
        assert own.inputs.values.shape == (ROWS, len(features))

    def test_features_without_names_are_all_that_are_no_labels(self, tmp_path):
        path, features, labels = breast_cancer(tmp_path / "cells.csv")
        own = rows_of(path, features=(), tasks=tuple(labels))
        assert own.inputs.names == tuple(features)

    def test_ids_and_long_texts_are_no_features_unless_named(self, tmp_path):
        columns = {**PLAIN, "id": lambda row: f"p{row}", "note": lambda row: f"words {row % 30}"}
        own = rows_of(table(tmp_path / "t.csv", columns), features=(), tasks=("a", "b"))
        assert own.inputs.names == ("x",)
        assert {"id", "note"} <= set(own.left_out)
        with pytest.raises(DataError, match=r"column note .*30 different texts.*--features"):
            rows_of(tmp_path / "t.csv", features=("x", "note"), tasks=("a", "b"))

    def test_texts(self, tmp_path):
        path, labels = described(tmp_path / "texts.csv")
        own = rows_of(path, text="text")
        assert own.form == "text"
        assert list(own.kinds) == labels
        with path.open() as file:
            assert list(own.inputs) == [row["text"] for row in csv.DictReader(file)]

    def test_images_are_found_by_their_paths(self, tmp_path):
        path, labels = digit_images(tmp_path)
        own = rows_of(path)
        assert own.form == "image"
        assert own.columns == ("image",)
        assert list(own.kinds) == labels
        assert own.inputs[3] == tmp_path / "pictures" / "003.png"

    def test_kinds_of_labels(self, tmp_path):
        path, features, _ = breast_cancer(tmp_path / "cells.csv", mixed=True)
        own = rows_of(path, features=tuple(features))
        assert {kind.name for kind in own.kinds.values()} == {"binary", "classes", "number"}
        for kind, column in zip(own.kinds.values(), own.labels.double().unbind(1)):
            if kind.name == "number":
                assert kind.unit == pytest.approx(float(column.std()))

    def test_missing_labels(self, tmp_path):
        columns = {
            **PLAIN,
            "c": lambda row: "" if row % 3 else str(row // 3 % 2),
            "d": lambda row: ("-9", "1", "0")[row % 3],
        }
        own = rows_of(table(tmp_path / "t.csv", columns, 90), features=("x",), missing_value=("-9",))
        assert own.labels.isnan().sum(0).tolist() == [0, 0, 60, 30]
        assert own.kinds["d"].name == "binary"


class TestFeatures:
    def test_against_a_slow_form(self, tmp_path):
        generator = np.random.default_rng(0)
        numbers = [None if generator.random() < 0.2 else float(generator.normal(3, 2)) for _ in range(80)]
        colours = [("red", "green", "", "blue")[int(generator.integers(4))] for _ in range(80)]
        rows = [
            {"n": "" if number is None else repr(number), "colour": colour, "comma": f"{row},5", "same": "1"}
            for row, (number, colour) in enumerate(zip(numbers, colours))
        ]
        frame, _ = read_frame(write(tmp_path / "t.csv", rows), "n")
        found = read_features(frame, ["n", "colour", "comma", "same"], named=True, place="t")
        assert found.names == ("n", "colour=blue", "colour=green", "colour=red", "comma")
        assert found.left_out == {"same": "the same in all rows"}
        train = torch.tensor(generator.permutation(80)[:50])
        own = found.standardised(train)
        assert own.shape == (80, 6)

        chosen = train.tolist()
        known = [numbers[row] for row in chosen if numbers[row] is not None]
        mean, spread = np.mean(known), np.std(known)
        expected = [0.0 if number is None else (number - mean) / spread for number in numbers]
        assert torch.allclose(own[:, 0], torch.tensor(expected).float(), atol=1e-5)
        columns = [[float(one == colour) for one in colours] for colour in ("blue", "green", "red")]
        columns += [[row + 0.5 for row in range(80)], [float(number is None) for number in numbers]]
        for place, column in enumerate(columns, start=1):
            values = np.array(column)
            expected = (values - values[chosen].mean()) / values[chosen].std()
            assert torch.allclose(own[:, place], torch.tensor(expected).float(), atol=1e-5)

    def test_rows_beside_the_training_rows_change_nothing(self, tmp_path):
        path, features, _ = breast_cancer(tmp_path / "cells.csv")
        own = rows_of(path, features=tuple(features)).inputs
        train = torch.arange(100)
        changed = own.values.clone()
        changed[100:] *= 7
        other = type(own)(own.names, changed, {})
        assert torch.equal(own.standardised(train)[:100], other.standardised(train)[:100])

    def test_a_column_without_a_number_in_training_rows(self, tmp_path):
        rows = [{"x": str(row), "y": str(row % 7) if row >= 40 else ""} for row in range(60)]
        frame, _ = read_frame(write(tmp_path / "t.csv", rows), "x")
        own = read_features(frame, ["x", "y"], named=True, place="t").standardised(torch.arange(40))
        assert torch.isfinite(own).all()

    def test_infinite_number(self, tmp_path):
        columns = {**PLAIN, "y": lambda row: "inf" if row == 8 else str(row)}
        with pytest.raises(DataError, match=r"column y of .* has inf in row 9"):
            rows_of(table(tmp_path / "t.csv", columns), features=("x", "y"))


class TestSplits:
    def test_each_seed_draws_another_and_the_same_again(self, tmp_path):
        path, features, _ = breast_cancer(tmp_path / "cells.csv")
        own = rows_of(path, features=tuple(features))
        first, again, other = (own.split(seed, 0.2, 0.2) for seed in (0, 0, 1))
        assert {name: len(rows) for name, rows in first.items()} == {"train": 180, "validation": 60, "test": 60}
        assert sorted(torch.cat(list(first.values())).tolist()) == list(range(ROWS))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not torch.equal(first["test"], other["test"])

    def test_the_same_text_is_in_one_split(self, tmp_path):
        columns = {**PLAIN, "words": lambda row: f"text of {row // 2}"}
        own = rows_of(table(tmp_path / "t.csv", columns, 200), text="words", tasks=("a", "b"))
        for seed in range(5):
            texts = [{own.inputs[row] for row in rows.tolist()} for rows in own.split(seed, 0.2, 0.2).values()]
            assert sum(map(len, texts)) == 100

    def test_other_splits_in_the_column_are_other_data(self, tmp_path):
        names = ("train", "validation", "test")
        tables = [
            table(tmp_path / f"{shift}.csv", {**PLAIN, "split": lambda row, shift=shift: names[(row + shift) % 3]})
            for shift in (0, 1)
        ]
        columns = {"features": ("x",), "tasks": ("a", "b")}
        one, other = (rows_of(path, **columns, split_column="split").fingerprint for path in tables)
        assert one != other
        assert len({rows_of(path, **columns).fingerprint for path in tables}) == 1

    def test_a_column_gives_them_for_all_seeds(self, tmp_path):
        columns = {**PLAIN, "part": lambda row: ("train", "train", "val", "test")[row % 4]}
        own = rows_of(table(tmp_path / "t.csv", columns, 80), features=("x",), split_column="part")
        assert own.split(0, 0.2, 0.2) == own.split(1, 0.2, 0.2)
        assert own.split(0, 0.2, 0.2)["test"].tolist() == list(range(3, 80, 4))
        assert list(own.kinds) == ["a", "b"]

    def test_units_of_the_training_rows(self, tmp_path):
        path, features, _ = breast_cancer(tmp_path / "cells.csv", mixed=True)
        own = rows_of(path, features=tuple(features))
        train = own.split(0, 0.2, 0.2)["train"]
        kinds = own.kinds_of(train)
        task, column = next((task, place) for place, (task, kind) in enumerate(kinds.items()) if kind.name == "number")
        known = own.labels[train, column].double()
        assert kinds[task].mean == pytest.approx(float(known.mean()))
        assert kinds[task].spread == pytest.approx(float(known.std()))
        assert kinds[task].unit == own.kinds[task].unit


class TestFingerprint:
    def test_changes_with_what_is_read(self, tmp_path):
        first = rows_of(
            table(tmp_path / "t.csv", {**PLAIN, "unused": lambda row: "1"}), features=("x",), tasks=("a", "b")
        )
        same = rows_of(
            table(tmp_path / "u.csv", {**PLAIN, "unused": lambda row: "2"}), features=("x",), tasks=("a", "b")
        )
        other = {**PLAIN, "x": lambda row: str(row * 0.5 + (row == 7))}
        changed = rows_of(table(tmp_path / "v.csv", other), features=("x",), tasks=("a", "b"))
        assert first.fingerprint == same.fingerprint != changed.fingerprint


class TestWrongTables:
    def test_no_rows(self, tmp_path):
        path = tmp_path / "t.csv"
        path.write_text("x,a,b\n")
        with pytest.raises(DataError, match="has no rows"):
            rows_of(path, features=("x",))

    def test_too_few_rows(self, tmp_path):
        with pytest.raises(DataError, match=f"has {LEAST_ROWS - 1} rows .* needs {LEAST_ROWS} at least"):
            rows_of(table(tmp_path / "t.csv", PLAIN, LEAST_ROWS - 1), features=("x",))

    def test_no_inputs_named(self, tmp_path):
        with pytest.raises(DataError, match=r"columns 'x', 'a', 'b'.*--image COLUMN.*--text COLUMN.*--features COLUMN"):
            rows_of(table(tmp_path / "t.csv", PLAIN))

    def test_two_kinds_of_inputs(self, tmp_path):
        with pytest.raises(DataError, match="--text and --features"):
            rows_of(table(tmp_path / "t.csv", PLAIN), text="x", features=("a",))

    def test_no_such_column(self, tmp_path):
        with pytest.raises(DataError, match="no column 'z'"):
            rows_of(table(tmp_path / "t.csv", PLAIN), features=("x", "z"))

    def test_no_labels(self, tmp_path):
        with pytest.raises(DataError, match=r"leave none for the labels.*--tasks"):
            rows_of(table(tmp_path / "t.csv", PLAIN), features=("x", "a", "b"))

    def test_one_label(self, tmp_path):
        with pytest.raises(DataError, match=r"only 1 label column\(s\) \('b'\).*two"):
            rows_of(table(tmp_path / "t.csv", PLAIN), features=("x", "a"))

    def test_a_column_as_input_and_label(self, tmp_path):
        with pytest.raises(DataError, match="column 'a' .* an input and as a label"):
            rows_of(table(tmp_path / "t.csv", PLAIN), features=("x", "a"), tasks=("a", "b"))

    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (lambda row: "1", "all 60 labels are the same"),
            (lambda row: str(int(row < 2)), "all but 2 labels are the same"),
            (lambda row: str(row % 2) if row < 10 else "", "10 labels, fewer than 20"),
            (lambda row: "", "no label"),
        ],
    )
    def test_a_label_column_that_cannot_be_learned(self, tmp_path, make, why):
        path = table(tmp_path / "t.csv", {**PLAIN, "c": make})
        own = rows_of(path, features=("x",))
        assert list(own.kinds) == ["a", "b"]
        assert own.left_out["c"] == why
        assert why in own.about
        with pytest.raises(DataError, match=f"'c' \\({why}\\).*--tasks"):
            rows_of(path, features=("x",), tasks=("a", "b", "c"))

    def test_empty_texts(self, tmp_path):
        columns = {**PLAIN, "words": lambda row: "  " if row in (4, 9) else f"some words {row}"}
        with pytest.raises(DataError, match=r"'words' .* is empty in 2 row\(s\), first in row 5"):
            rows_of(table(tmp_path / "t.csv", columns), text="words", tasks=("a", "b"))

    def test_categories_are_no_texts(self, tmp_path):
        columns = {**PLAIN, "colour": lambda row: ("red", "blue")[row % 2]}
        with pytest.raises(DataError, match=r"'colour' .* has 2 different texts.*--features"):
            rows_of(table(tmp_path / "t.csv", columns), text="colour", tasks=("a", "b"))

    def test_images_that_are_missing(self, tmp_path):
        path, _ = digit_images(tmp_path)
        for number in range(ROWS - LEAST_ROWS):
            (tmp_path / "pictures" / f"{number:03d}.png").unlink()
        with pytest.warns(UserWarning, match="250 of 300 images cannot be read"):
            own = rows_of(path, image="image", tasks=("even", "large"))
        assert len(own) == LEAST_ROWS
        assert "250 rows whose images cannot be read" in own.about
        (tmp_path / "pictures" / "299.png").unlink()
        (tmp_path / "again.csv").write_text(path.read_text())
        with pytest.warns(UserWarning, match="251 of 300"), pytest.raises(DataError, match="has 49 rows"):
            rows_of(tmp_path / "again.csv", image="image", tasks=("even", "large"))

    def test_no_image_at_all(self, tmp_path):
        columns = {**PLAIN, "image": lambda row: f"{row}.png"}
        with pytest.raises(DataError, match="60 of 60 images cannot be read"):
            rows_of(table(tmp_path / "t.csv", columns), image="image", tasks=("a", "b"))
