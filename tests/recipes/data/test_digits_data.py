"""Splits of the digits."""

import pytest

from recipes.data.digits import TEST_IMAGES, digit_splits, most_per_class


def test_splits_are_disjoint_and_stratified():
    for seed in (0, 7):
        splits = digit_splits(seed, 10, 20)
        parts = [splits.train, splits.validation, splits.test]
        rows = [row for part in parts for row in part.rows]
        assert len(rows) == len(set(rows)) == 100 + 200 + TEST_IMAGES
        assert splits.train.labels.sum(0).tolist() == [10] * 10
        assert splits.validation.labels.sum(0).tolist() == [20] * 10
        counts = splits.test.labels.sum(0)
        assert counts.sum() == TEST_IMAGES
        assert counts.min() >= 76
        assert counts.max() <= 82
        assert splits.train.inputs.min() == -1
        assert splits.train.inputs.max() == 1


def test_seeds_share_the_test_images_only():
    one, two = digit_splits(0, 10, 20), digit_splits(1, 10, 20)
    assert one.test.rows == two.test.rows
    assert one.train.rows != two.train.rows


def test_more_images_than_there_are():
    assert most_per_class() == 97
    with pytest.raises(ValueError, match="there are 97 images of the rarest class"):
        digit_splits(0, 78, 20)
