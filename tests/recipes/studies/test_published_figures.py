"""Figures that the authors printed: which methods of ours they can stand beside, and that they are what was read."""

import pytest

from recipes.methods.methods import METHODS
from recipes.studies.comparison.published import BESIDE, PUBLISHED
from recipes.studies.comparison.report.table import published_markdown


def test_every_published_method_has_one_of_ours():
    for keys in BESIDE.values():
        assert keys
        assert all(key in METHODS for key in keys)
    together = [key for keys in BESIDE.values() for key in keys]
    assert len(set(together)) == len(together)


@pytest.mark.parametrize("data", PUBLISHED)
def test_all_rows_have_all_metrics_in_per_cent(data):
    figures = PUBLISHED[data].figures
    assert list(figures) == list(BESIDE)
    for row in figures.values():
        assert list(row) == ["accuracy", "AUC", "precision", "recall"]
        assert all(0 < float(value) < 100 and len(value) == 5 for value in row.values()), "two decimals, as printed"


def test_some_rows_as_they_were_read():
    cifar, celeba = (PUBLISHED[data].figures for data in ("cifar_mtl", "celeba"))
    assert list(cifar["Hard-Share"].values()) == ["94.70", "95.56", "76.30", "72.28"]
    assert list(cifar["MRN"].values()) == ["94.51", "96.67", "79.94", "76.95"]
    assert list(celeba["SRDML"].values()) == ["90.15", "92.95", "73.87", "64.91"]
    assert list(celeba["RMTL"].values()) == ["75.52", "66.99", "37.48", "36.74"]


def test_the_printed_order_of_the_best():
    """The last row is printed in bold in all columns."""
    for published in PUBLISHED.values():
        for metric in ("accuracy", "AUC", "precision", "recall"):
            best = max(published.figures, key=lambda name: float(published.figures[name][metric]))
            assert best == "SRDML (w/. PCGrad)"


def test_the_table_says_where_it_is_from():
    text = published_markdown(list(PUBLISHED.values()))
    assert text.count("KDD 2022") == 2
    assert "| SRDML (w/. PCGrad) | 96.03 | 96.72 | 82.59 | 77.01 |" in text
    assert "not known" in text
