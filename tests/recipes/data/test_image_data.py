"""Images and labels from files: kinds of labels, what is missing, splits, and what is wrong with them."""

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.data.hub import load_splits
from recipes.data.images.cifar import ATTRIBUTES, CLASSES, MEAN, STD, cifar_splits, fingerprint
from recipes.data.images.in_columns import decoded_pixels
from recipes.data.images.in_files import FileImages, readable
from recipes.data.images.in_memory import AugmentedImages, Images, resized
from recipes.data.label_columns import check_columns, labels_of, without_constant_tasks
from recipes.data.splits import check_no_image_twice, rows_by_chance, rows_by_column
from recipes.data.task_kinds import BINARY, TaskKind
from recipes.runtime.errors import DataError, OptionError, need
from recipes.training.batches import Feed, GlobalBatches

from ..support.small_images import cifar_image, encoded, image_column, noise, write_cifar, write_parquet

pytestmark = pytest.mark.usefixtures("quiet_hub")

NAN = math.nan


def same(found, expected):
    return torch.equal(found.nan_to_num(-99), torch.tensor(expected).nan_to_num(-99))


class TestLabels:
    @pytest.mark.parametrize(
        ("values", "kind", "labels"),
        [
            ([0, 1, 1], BINARY, [0.0, 1.0, 1.0]),
            ([0.0, None, 1.0], BINARY, [0.0, NAN, 1.0]),
            ([True, False, None], BINARY, [1.0, 0.0, NAN]),
            ([np.True_, np.int64(0), np.float32("nan")], BINARY, [1.0, 0.0, NAN]),
            (["true", "False", " TRUE "], BINARY, [1.0, 0.0, 1.0]),
            (["0", "1", ""], BINARY, [0.0, 1.0, NAN]),
            ([-1, 1, 1], BINARY, [0.0, 1.0, 1.0]),
            ([1, 1], BINARY, [1.0, 1.0]),
            ([0, 1, 2], TaskKind("classes", 3), [0.0, 1.0, 2.0]),
            (["2", "nan", "0", "1"], TaskKind("classes", 3), [2.0, NAN, 0.0, 1.0]),
            (["cat", None, " dog", "cat "], TaskKind("classes", 2), [0.0, NAN, 1.0, 0.0]),
            ([0, 1, 3], TaskKind("number"), [0.0, 1.0, 3.0]),
            ([0.0, 0.5], TaskKind("number"), [0.0, 0.5]),
            (["1e3", "-2.5"], TaskKind("number"), [1000.0, -2.5]),
            (list(range(20)), TaskKind("classes", 20), list(map(float, range(20)))),
            (list(range(21)), TaskKind("number"), list(map(float, range(21)))),
            (["Yes", "no", "YES", ""], BINARY, [1.0, 0.0, 1.0, NAN]),
            (["yes", "0", "true"], BINARY, [1.0, 0.0, 1.0]),
            (["yes", "no", "maybe"], TaskKind("classes", 3), [2.0, 1.0, 0.0]),
            (["1,5", "-2,25", "3", None], TaskKind("number"), [1.5, -2.25, 3.0, NAN]),
            (["1,5", "2,5", "big"], TaskKind("classes", 3), [0.0, 1.0, 2.0]),
            ([0, 1, 1, 2], TaskKind("classes", 3), [0.0, 1.0, 1.0, 2.0]),
            ([0, 1] * 5 + [2, 2], TaskKind("classes", 3), [0.0, 1.0] * 5 + [2.0, 2.0]),
        ],
    )
    def test_kinds_are_found(self, values, kind, labels):
        found, tensor, _ = labels_of("x", values)
        assert found == kind
        assert tensor.dtype == torch.float32
        assert same(tensor, labels)

    @pytest.mark.parametrize("value", [None, NAN, "", "  ", "nan", "NaN", np.float64("nan"), need("pandas").NA, "<NA>"])
    def test_spellings_of_missing(self, value):
        assert same(labels_of("x", [1, value, 0])[1], [1.0, NAN, 0.0])

    @pytest.mark.parametrize("value", [-1, -1.0, "-1", " -1 ", "-1.0", np.int64(-1)])
    def test_own_spelling_of_missing(self, value):
        assert same(labels_of("x", [1, value, 0], missing=["-1", "unknown"])[1], [1.0, NAN, 0.0])

    def test_single_slip_is_found_by_its_place(self):
        values, places = [0, 1] * 10, [f"row {row} ({row}.png)" for row in range(20)]
        values[7] = 7
        with pytest.raises(DataError, match=re.escape("correct row 7 (7.png)")):
            labels_of("x", values, places=places)
        assert labels_of("x", values, "classes", places=places)[0] == TaskKind("classes", 3)
        assert labels_of("x", values, missing=["7"], places=places)[0] == BINARY

    def test_truth_values_that_are_classes_keep_their_names(self):
        assert labels_of("x", ["yes", "no"], "classes")[2] == ("no", "yes")

    def test_nothing_but_missing(self):
        kind, labels, names = labels_of("x", [None, ""])
        assert (kind, names) == (BINARY, ())
        assert torch.isnan(labels).all()
        assert len(labels) == 2

    def test_names_of_classes_are_in_the_order_of_the_labels(self):
        assert labels_of("x", ["b", "a", None, "c"])[2] == ("a", "b", "c")
        assert labels_of("x", [7, 3, 3], "classes")[2] == ("3", "7")
        assert labels_of("x", [7, 3, 3.5], "classes")[2] == ("3", "3.5", "7")

    def test_ratings_become_numbers_with_a_warning(self):
        with pytest.warns(
            UserWarning, match="whole numbers 1 to 3 and becomes a regression. If they are classes, use --kind"
        ):
            found, labels, _ = labels_of("x", [1, 3, None, 2])
        assert found == TaskKind("number")
        assert same(labels, [1.0, 3.0, NAN, 2.0])
        assert labels_of("x", [1, 3, None, 2], "classes")[0] == TaskKind("classes", 3)

    @pytest.mark.parametrize(
        ("values", "kind", "expected", "labels"),
        [
            ([0, 1, 2], "number", TaskKind("number"), [0.0, 1.0, 2.0]),
            ([1, 2, 4], "classes", TaskKind("classes", 3), [0.0, 1.0, 2.0]),
            ([-1, 0, 1], "number", TaskKind("number"), [-1.0, 0.0, 1.0]),
            ([-1, 1, None], "binary", BINARY, [0.0, 1.0, NAN]),
            ([-1, -1], "binary", BINARY, [0.0, 0.0]),
            ([0, 1], "classes", TaskKind("classes", 2), [0.0, 1.0]),
        ],
    )
    def test_kinds_that_are_given(self, values, kind, expected, labels):
        found, tensor, _ = labels_of("x", values, kind)
        assert found == expected
        assert same(tensor, labels)

    @pytest.mark.parametrize(
        ("values", "kind", "message"),
        [
            (
                [0, 1, "?"],
                None,
                "'x' has texts such as '?' and numbers. If '?' stands for a missing label, use --missing-value ?",
            ),
            ([0, 1, math.inf], None, "'x' has infinite labels"),
            (["0", "-inf"], None, "infinite labels"),
            ([0.0, 1e39], None, "infinite labels"),
            ([-1, 0, 1], None, "-1 may be a missing label or a class. Use --missing-value -1, or --kind x=number"),
            (["a", "b"], "number", "texts such as 'a', and these are no numbers"),
            (["a", "b"], "binary", "'x' has the label a, expected 0 and 1"),
            (
                [0, 1, 2],
                "binary",
                "'x' has the label 2, expected 0 and 1. If it stands for a missing label, use --missing-value 2",
            ),
            ([0, 1] * 5 + [2], None, "'x' has the label 2, expected 0 and 1"),
            ([0, 1] * 5 + [2], None, "if it is a slip, correct row 10"),
            (["1", "0"] * 5 + ["l"], None, "'x' has the label l, expected 0 and 1"),
            (
                ["yes", "no"] * 5 + ["2"],
                None,
                "use --missing-value 2; for a column of another kind, use --kind x=classes",
            ),
            (["1,5", "2.5"], None, "'x' has decimal commas such as '1,5' and other numbers or texts"),
            ([f"t{number}" for number in range(1001)], None, "1001 different labels, which are too many for classes"),
        ],
    )
    def test_what_fits_no_kind_is_refused(self, values, kind, message):
        with pytest.raises(DataError, match=re.escape(message)):
            labels_of("x", values, kind)


SOME_KINDS = {"a": BINARY, "b": TaskKind("number"), "c": BINARY, "d": TaskKind("classes", 3), "e": BINARY}
#: Rows 0 to 2 are of the training split.
SOME_LABELS = torch.tensor(
    [
        [0.0, 2.0, 1.0, 0.0, NAN],
        [1.0, 4.0, NAN, 2.0, NAN],
        [NAN, 6.0, 1.0, NAN, NAN],
        [1.0, 900.0, 0.0, 1.0, 1.0],
    ]
)


class TestConstantTasks:
    def test_are_left_out_with_one_warning(self):
        with pytest.warns(UserWarning, match="nothing to learn") as caught:
            kinds, labels, left_out = without_constant_tasks(SOME_KINDS, SOME_LABELS, torch.arange(3))
        assert len(caught) == 1
        assert left_out == {
            "c": "all 2 labels of training images are the same",
            "e": "no training image has a label",
        }
        assert all(f"{task!r} ({reason})" in str(caught[0].message) for task, reason in left_out.items())
        assert list(kinds) == ["a", "b", "d"]
        assert same(labels, SOME_LABELS[:, [0, 1, 3]].tolist())
        assert kinds["b"] == TaskKind("number", mean=4.0, spread=2.0), "of the training rows alone"

    def test_nothing_is_said_where_all_can_be_learned(self):
        kinds, labels, left_out = without_constant_tasks(
            {task: SOME_KINDS[task] for task in "ab"}, SOME_LABELS[:, :2], torch.arange(3)
        )
        assert list(kinds) == ["a", "b"]
        assert labels.shape == (4, 2)
        assert left_out == {}

    def test_one_task_is_too_few(self):
        with (
            pytest.warns(UserWarning, match="left out"),
            pytest.raises(DataError, match=re.escape("only 1 task(s) can be learned, and relations need two")),
        ):
            without_constant_tasks({"a": BINARY, "c": BINARY}, SOME_LABELS[:, [0, 2]], torch.arange(3))


class TestColumns:
    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            (["Smilin"], "the table has no column 'Smilin'. Did you mean 'Smiling'?"),
            (["image", "zzz"], "the table has no column 'zzz'. It has 'image', 'Smiling', 'Young'."),
        ],
    )
    def test_missing_ones_are_named(self, wanted, message):
        with pytest.raises(DataError, match=re.escape(message)):
            check_columns(wanted, ["image", "Smiling", "Young"], "the table")
        check_columns(["Young"], ["image", "Smiling", "Young"], "the table")


class TestSplits:
    def test_by_chance_are_disjoint_and_complete(self):
        rows = rows_by_chance(range(41), 0.2, 0.25, seed=3)
        assert {split: len(own) for split, own in rows.items()} == {"train": 23, "validation": 8, "test": 10}
        assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(41))
        again, other = rows_by_chance(range(41), 0.2, 0.25, seed=3), rows_by_chance(range(41), 0.2, 0.25, seed=4)
        assert all(torch.equal(own, again[split]) for split, own in rows.items())
        assert not torch.equal(rows["train"], other["train"])

    def test_all_rows_of_an_image_are_in_one_split(self):
        images = [f"{row % 20}.png" for row in range(50)]
        rows = rows_by_chance(images, 0.2, 0.2, seed=0)
        assert sorted(torch.cat(list(rows.values())).tolist()) == list(range(50))
        of_splits = [{images[row] for row in own.tolist()} for own in rows.values()]
        assert sum(map(len, of_splits)) == 20
        check_no_image_twice(images, rows)
        with pytest.raises(DataError, match="0.png is in the train and in the test split"):
            check_no_image_twice(images, {"train": torch.tensor([0, 1]), "test": torch.tensor([20])})

    @pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.3)])
    def test_shares_that_leave_nothing(self, shares):
        with pytest.raises(OptionError, match="leave nothing to train. Use less"):
            rows_by_chance(range(100), *shares, seed=0)

    def test_empty_split_by_chance(self):
        with pytest.raises(
            DataError, match="the validation split is empty: there are 4 for train, 0 for validation, 1 for test"
        ):
            rows_by_chance(range(5), 0.05, 0.2, seed=0)

    def test_by_column(self):
        rows = rows_by_column(["train", " Val", "TEST", "training", "valid", "validation", "dev"], "part")
        assert {split: own.tolist() for split, own in rows.items()} == {
            "train": [0, 3],
            "validation": [1, 4, 5, 6],
            "test": [2],
        }

    @pytest.mark.parametrize("value", ["tset", None, NAN, 0])
    def test_other_values(self, value):
        with pytest.raises(DataError, match=r"row 1 has .* in the column 'part', expected train, validation or test"):
            rows_by_column(["train", value], "part")

    def test_empty_split_by_column(self):
        with pytest.raises(DataError, match="the test split is empty"):
            rows_by_column(["train", "val"], "part")


class TestFiles:
    @pytest.fixture
    def paths(self, tmp_path):
        """Two images, and three that are none: cut short, a text, and not there."""
        whole = encoded(noise(0), "JPEG")
        contents = {
            "a.jpg": whole,
            "cut.jpg": whole[:-40],
            "text.png": b"no image",
            "b.png": encoded(noise(1)),
        }
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        return [tmp_path / name for name in (*contents, "nowhere.png")]

    def test_unreadable_ones_are_skipped_with_one_warning(self, paths):
        with pytest.warns(UserWarning, match="3 of 5 images cannot be read") as caught:
            assert readable(paths, "decode", strict=False) == [0, 3]
        (warning,) = caught
        assert f"{paths[4]} (no such file)" in str(warning.message)
        assert "use --strict to stop instead" in str(warning.message)
        for path in (paths[1], paths[2]):
            assert str(path) in str(warning.message)
        assert str(warning.message).count(str(paths[2])) == 1

    def test_header_finds_what_is_no_image(self, paths):
        with pytest.warns(UserWarning, match="2 of 5 images cannot be read"):
            assert readable(paths, "header", strict=False) == [0, 1, 3]

    def test_none_believes_them(self, paths):
        assert readable(paths, "none", strict=True) == list(range(5))

    def test_strict(self, paths):
        with pytest.raises(
            DataError, match=r"3 of 5 images cannot be read: .*cut.jpg.*Leave out --strict to skip them"
        ):
            readable(paths, "decode", strict=True)

    def test_whole_ones_are_no_matter(self, paths):
        assert readable([paths[0], paths[3]], "decode", strict=True) == [0, 1]

    def test_none_that_can_be_read(self, paths):
        with pytest.raises(DataError, match="3 of 3 images cannot be read.*Use --images with the folder"):
            readable([paths[1], paths[2], paths[4]], "decode", strict=False)

    def test_images_are_opened_when_they_are_needed(self, paths):
        images = FileImages(paths, torch.arange(10.0).reshape(5, 2), np.asarray)
        pixels, labels = images[3]
        assert np.array_equal(pixels, noise(1))
        assert labels.tolist() == [6.0, 7.0]
        assert len(images) == 5
        with pytest.raises(DataError, match=r"text.png cannot be read .*Use --check decode to find and skip"):
            images[2]

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
    def test_every_kind_of_image_has_three_channels(self, tmp_path, mode):
        path = tmp_path / "image.tiff"
        need("PIL.Image").fromarray(noise(0).astype(np.uint8)).convert(mode).save(path)
        assert FileImages([path], torch.zeros(1, 1), np.asarray)[0][0].shape == (32, 32, 3)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    return write_cifar(tmp_path_factory.mktemp("cifar"))


class TestHub:
    def test_pixels_are_those_of_the_files(self, cifar):
        split = load_splits(cifar, ("train", "test"))["test"]
        pixels = decoded_pixels(split, "img", "test split")
        assert pixels.shape == (20, 3, 32, 32)
        expected = np.asarray(need("PIL.Image").open(io.BytesIO(cifar_image(3, 10_013))))
        assert np.array_equal(pixels[13].permute(1, 2, 0).numpy(), expected)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("nowhere", "found no folder nowhere. Pass the folder of parquet files, or the id"),
            ("/nowhere/at/all", "found no folder /nowhere/at/all"),
            ("./some/folder", "found no folder"),
        ],
    )
    def test_no_folder(self, data, message):
        with pytest.raises(DataError, match=message):
            load_splits(data, ("train",))

    def test_folder_without_the_split(self, cifar):
        with pytest.raises(DataError, match=r"found no valid.parquet and no valid-\*.parquet in"):
            load_splits(cifar, ("train", "valid"))

    def test_file_that_is_no_parquet(self, tmp_path):
        (tmp_path / "train.parquet").write_text("no parquet")
        with pytest.raises(DataError, match="cannot be read"):
            load_splits(str(tmp_path), ("train",))

    def test_images_that_cannot_be_used(self, tmp_path):
        for name, second, message in (
            ("broken", b"none", "row 1 of the data has no readable image"),
            (
                "other size",
                encoded(noise(0, 16, 16)),
                r"row 1 of the data is an image of \(16, 16\) pixels, the first one",
            ),
        ):
            write_parquet(tmp_path / name / "train.parquet", {"img": image_column([encoded(noise(0)), second])})
            with pytest.raises(DataError, match=message):
                decoded_pixels(load_splits(str(tmp_path / name), ("train",))["train"], "img", "data")

    def test_column_that_has_no_images(self, tmp_path):
        write_parquet(tmp_path / "train.parquet", {"img": [1, 2]})
        with pytest.raises(DataError, match="column 'img' of the data"):
            decoded_pixels(load_splits(str(tmp_path), ("train",))["train"], "img", "data")


class TestCifar:
    def splits(self, cifar, **options):
        return cifar_splits(cifar, **{"seed": 0, "train_images": 50, "validation_images": 20, **options})

    def test_as_many_of_each_class_and_none_twice(self, cifar):
        splits = self.splits(cifar)
        train, validation = splits.train.images, splits.validation
        assert splits.tasks == CLASSES
        assert train.labels.sum(0).tolist() == [5.0] * 10
        assert validation.labels.sum(0).tolist() == [2.0] * 10
        assert len(splits.test) == 20
        drawn = {pixels.numpy().tobytes() for own in (train, validation, splits.test) for pixels in own.pixels}
        assert len(drawn) == 90
        # The bright stripe says the class.
        for own in (train, validation, splits.test):
            stripes = own.pixels.float().amax(1)[:, :30].unflatten(1, (10, 3)).mean((2, 3)).argmax(1)
            assert torch.equal(stripes, own.labels.argmax(1))
        assert torch.equal(splits.test_classes, splits.test.labels.argmax(1))

    def test_seed_draws_training_images_and_leaves_the_test_images(self, cifar):
        one, same, other = self.splits(cifar), self.splits(cifar), self.splits(cifar, seed=1)
        assert torch.equal(one.train.images.pixels, same.train.images.pixels)
        assert not torch.equal(one.train.images.pixels, other.train.images.pixels)
        assert torch.equal(one.test.pixels, other.test.pixels)

    def test_attributes_are_those_of_the_classes(self, cifar):
        classes, attributes = self.splits(cifar), self.splits(cifar, tasks="attributes")
        assert attributes.tasks == tuple(ATTRIBUTES)
        for row, number in enumerate(classes.test_classes.tolist()):
            expected = [float(CLASSES[number] in members) for members in ATTRIBUTES.values()]
            assert attributes.test.labels[row].tolist() == expected

    def test_some_training_labels_are_kept(self, cifar):
        whole, few = self.splits(cifar), self.splits(cifar, labelled=0.3)
        assert torch.equal(whole.train.images.pixels, few.train.images.pixels)
        kept = ~torch.isnan(few.train.images.labels)
        assert 0.2 < kept.float().mean() < 0.4
        assert torch.equal(few.train.images.labels[kept], whole.train.images.labels[kept])
        assert not torch.isnan(few.validation.labels).any()
        assert not torch.isnan(few.test.labels).any()

    def test_fingerprint_is_of_the_content(self, cifar, tmp_path):
        assert (
            fingerprint(cifar)
            == fingerprint(write_cifar(tmp_path / "same"))
            != fingerprint(write_cifar(tmp_path / "other", 7))
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"train_images": 55}, "found 55 training images. Pass a multiple of ten"),
            ({"validation_images": 0}, "found 0 validation images"),
            ({"train_images": 70}, "there are 80 of which each class has as many. Use 80 or less"),
            ({"tasks": "animals"}, "Use one of classes, attributes"),
            ({"labelled": 1.5}, "above 0 and at most 1, found 1.5"),
        ],
    )
    def test_options_that_cannot_work(self, cifar, options, message):
        with pytest.raises(OptionError, match=message):
            self.splits(cifar, **options)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ([0, 10], "labels from 0 to 10, expected 0 to 9"),
            ([0, None], "label"),
            (["cat", "dog"], "label"),
            ([], "is empty|cannot be read"),
        ],
    )
    def test_labels_that_are_none(self, tmp_path, labels, message):
        for split in ("train", "test"):
            images = image_column([encoded(noise(0))] * len(labels)) if labels else []
            write_parquet(tmp_path / f"{split}.parquet", {"img": images, "label": labels})
        with pytest.raises(DataError, match=message):
            self.splits(str(tmp_path))

    def test_other_columns(self, tmp_path):
        for split in ("train", "test"):
            write_parquet(tmp_path / f"{split}.parquet", {"image": [1], "fine_label": [0]})
        with pytest.raises(
            DataError,
            match="has no columns img, label. It has 'image', 'fine_label'. Expected the columns of uoft-cs/cifar10",
        ):
            self.splits(str(tmp_path))


class TestImages:
    @pytest.fixture
    def images(self):
        pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
        return Images(pixels, torch.arange(12.0).reshape(6, 2), MEAN, STD)

    def test_are_normalised(self, images):
        inputs, labels = images.rows_as_batch([4, 1])
        expected = (images.pixels[4].double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
            3, 1, 1
        )
        assert torch.allclose(inputs[0].double(), expected, atol=1e-5)
        assert labels.tolist() == [[8.0, 9.0], [2.0, 3.0]]

    def test_augmented_ones_are_mirrored_and_shifted(self, images):
        augmented, plain = AugmentedImages(images), images.rows_as_batch([2])[0][0]
        padded = torch.nn.functional.pad(plain[None], [2] * 4, mode="replicate")[0]
        allowed = {
            own.contiguous().numpy().tobytes()
            for down in range(5)
            for right in range(5)
            for cut in [padded[:, down : down + 16, right : right + 16]]
            for own in (cut, cut.flip(2))
        }
        torch.manual_seed(0)
        seen = {augmented[2][0].contiguous().numpy().tobytes() for _ in range(300)}
        assert seen <= allowed
        assert len(seen) > 45, "nearly all of the 50"

    def test_batches_do_not_depend_on_data_workers(self, images):
        micro = [own for step in GlobalBatches(6, 4, seed=7).steps(1) for own in step.own]
        found = []
        for workers in (0, 2, 0):
            feed = Feed(AugmentedImages(images), seed=7, workers=workers)
            found.append(list(feed(micro)))
            feed.close()
        torch.manual_seed(99)
        other = list(Feed(AugmentedImages(images), seed=8)(micro))
        for batches in found[1:]:
            assert all(torch.equal(a, b) for one, two in zip(found[0], batches) for a, b in zip(one, two))
        assert not torch.equal(found[0][0][0], other[0][0])

    def test_resized(self, images):
        assert resized(images.pixels, 16) is images.pixels
        large = resized(images.pixels, 32)
        assert large.shape == (6, 3, 32, 32)
        assert large.dtype == torch.uint8
        flat = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
        assert (resized(flat, 20) == 255).all()


@pytest.mark.parametrize("form", ["png", "tiff", "pgm"])
def test_sixteen_bits_of_grey_are_seen_as_they_are(form: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 16 * 16).round().astype(np.uint16).reshape(16, 16)
    image = Image.fromarray(values)
    path = tmp_path / f"x.{form}"
    (image if form != "pgm" else image.convert("I")).save(path)
    seen, _ = FileImages([path], torch.zeros(1, 1), np.asarray)[0]
    assert seen.shape == (16, 16, 3)
    assert np.abs(seen[..., 0] - values / 257).max() <= 0.5


@pytest.mark.parametrize(("turn", "shape"), [(1, (4, 8, 3)), (3, (4, 8, 3)), (6, (8, 4, 3)), (8, (8, 4, 3))])
def test_images_are_turned_as_exif_says(turn: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    seen, _ = FileImages([tmp_path / "x.png"], torch.zeros(1, 1), np.asarray)[0]
    assert seen.shape == shape
    assert seen[{1: (0, 0), 3: (3, 7), 6: (0, 3), 8: (7, 0)}[turn]].tolist() == [255, 255, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_grey_of_thirty_two_bits_is_refused(dtype: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.tiff"
    Image.fromarray(np.full((4, 4), 3, dtype)).save(path)
    with pytest.raises(DataError, match="32 bits of grey"):
        FileImages([path], torch.zeros(1, 1), np.asarray)[0]
    with pytest.raises(DataError, match="32 bits of grey"):
        readable([path], "header", False)
