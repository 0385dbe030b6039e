"""Rows of SARCOS and School, from small tables of their own."""

import pytest
import torch

from recipes.data.tabular import sarcos_splits, school_splits
from recipes.runtime.errors import DataError, OptionError

from ..support.small_images import write_parquet, write_tables

pytestmark = pytest.mark.usefixtures("quiet_hub")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"))


class TestData:
    def test_sarcos(self, data):
        splits = sarcos_splits(f"{data}/sarcos", seed=0, rows_per_task=4, validation_rows=30)
        known = ~torch.isnan(splits.train.labels)
        assert known.sum(0).tolist() == [4] * 7
        assert known.sum(1).tolist() == [1] * 28
        assert not torch.isnan(splits.validation.labels).any()
        assert splits.validation.labels.shape == (30, 7)
        assert splits.test.labels.shape == (30, 7)
        assert torch.allclose(splits.train.inputs.mean(0), torch.zeros(21), atol=1e-5)
        assert torch.allclose(splits.train.inputs.std(0), torch.ones(21), atol=1e-5)
        for joint, kind in enumerate(splits.kinds.values()):
            own = splits.train.labels[known[:, joint], joint]
            assert (kind.mean, kind.spread) == pytest.approx((float(own.mean()), float(own.std())), rel=1e-4)
        rows = torch.cat([splits.train.inputs, splits.validation.inputs])
        assert len(torch.unique(rows, dim=0)) == 58, "no row twice"

    def test_school(self, data):
        splits = school_splits(f"{data}/school", seed=0, validation_share=0.25)
        assert list(splits.kinds) == [f"school {number}" for number in range(1, 6)]
        assert (~torch.isnan(splits.train.labels)).sum(0).tolist() == [9] * 5
        assert (~torch.isnan(splits.validation.labels)).sum(0).tolist() == [3] * 5
        for own in (splits.train, splits.validation, splits.test):
            assert ((~torch.isnan(own.labels)).sum(1) == 1).all()
            assert torch.isfinite(own.inputs).all()
        assert len(set(splits.kinds.values())) == 1, "one mean and spread for all schools"

    def test_seed_draws_the_rows_and_leaves_the_test(self, data):
        one, same, other = (
            sarcos_splits(f"{data}/sarcos", seed=seed, rows_per_task=4, validation_rows=30) for seed in (0, 0, 1)
        )
        assert torch.equal(one.train.inputs, same.train.inputs)
        assert not torch.equal(one.train.inputs, other.train.inputs)
        assert torch.equal(one.test.labels, other.test.labels)

    def test_more_rows_than_there_are(self, data):
        with pytest.raises(
            OptionError, match="7 tasks of 10 rows and 30 validation rows were asked for, but there are 90"
        ):
            sarcos_splits(f"{data}/sarcos", seed=0, rows_per_task=10, validation_rows=30)

    def test_columns_that_are_missing_or_not_finite(self, tmp_path):
        for split in ("train", "test"):
            write_parquet(tmp_path / "columns" / f"{split}.parquet", {"score": [1.0], "school": [1]})
            full = {f"x{number:02d}": [0.0, 1.0] for number in range(28)}
            values = {**full, "score": [1.0, float("nan")], "school": [1, 1]}
            write_parquet(tmp_path / "values" / f"{split}.parquet", values)
            write_parquet(
                tmp_path / "schools" / f"{split}.parquet",
                {**full, "score": [1.0, 2.0], "school": [1, 1] if split == "train" else [1, 2]},
            )
            write_parquet(tmp_path / "none" / f"{split}.parquet", {**values, "score": [1.0, None]})
        for name, message in (
            ("columns", "has no columns x00, x01"),
            ("values", "has values that are not finite"),
            ("schools", r"schools without training rows: \[2\]"),
            ("none", "not finite|no numbers"),
        ):
            with pytest.raises(DataError, match=message):
                school_splits(str(tmp_path / name), seed=0, validation_share=0.5)
