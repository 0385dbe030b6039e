"""Rank correlations, closest pairs with intervals, several trainings."""

from __future__ import annotations

import itertools

import pytest
import torch

from saliency_reg import RelationViews, compare_views
from saliency_reg.errors import ConfigurationError, TaskError, WrongTypeError
from saliency_reg.relatedness.views import VIEWS, ClosePair
from saliency_reg.relatedness.views.ranks import average_ranks, spearman

from .support import NAN, random_views, with_gaps

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("seed", range(20))
def test_spearman_is_that_of_scipy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(3, 60, (), generator=generator))
    first = torch.randn(count, generator=generator, dtype=torch.float64)
    second = first + torch.randn(count, generator=generator, dtype=torch.float64)
    if seed % 2:  # with ties
        first, second = first.round(), second.round()
    expected = stats.spearmanr(first.numpy(), second.numpy()).statistic
    assert spearman(first, second) == pytest.approx(float(expected), abs=1e-12, nan_ok=True)
    assert average_ranks(first).tolist() == stats.rankdata(first.numpy()).tolist()


def test_rank_correlations_are_those_of_pairs_that_both_know() -> None:
    views = with_gaps(random_views(7, seed=1), [(0, 1), (2, 5)], ["label_correlation"])
    views = with_gaps(views, [(0, 1), (3, 4), (3, 6)], ["tag"])
    found = views.rank_correlations()
    pairs = list(itertools.combinations(range(7), 2))
    for (one, first), (other, second) in itertools.product(enumerate(VIEWS), repeat=2):
        values = []
        for i, j in pairs:
            own = [
                float(views[key][i, j] + views[key][j, i]) * (-1 if "distance" in key else 1) for key in (first, second)
            ]
            if not any(value != value for value in own):
                values.append(own)
        assert len(values) == 21 - len(
            {pair for key in {first, second} for pair in {"label_correlation": [1, 2], "tag": [1, 3, 4]}.get(key, [])}
        )
        expected = float(stats.spearmanr(*zip(*values)).statistic)
        assert found[one, other].item() == pytest.approx(expected, abs=1e-12)
    assert found.diagonal().tolist() == pytest.approx([1.0] * 7)


def test_a_distance_agrees_with_the_affinity_made_of_it() -> None:
    distance = random_views(5)["saliency_distance"]
    matrices = {
        "relation_weights": (3 - distance).fill_diagonal_(0).clamp(min=0),
        "saliency_distance": distance.clamp(max=3),
    }
    views = random_views(5, matrices=matrices, trajectory={})
    assert list(views) == ["saliency_distance", "relation_weights"]  # the order of all views
    assert views.rank_correlations().flatten().tolist() == pytest.approx([1.0] * 4)


def test_two_pairs_are_too_few() -> None:
    views = with_gaps(random_views(3), [(0, 1)], ["tag"])
    found = views.rank_correlations()
    assert bool(found[-1].isnan().all())
    assert not bool(found[:-1, :-1].isnan().any())
    assert bool(random_views(2).rank_correlations().isnan().all())


@pytest.mark.parametrize("key", VIEWS)
def test_closest_pairs(key: str) -> None:
    numpy = pytest.importorskip("numpy")
    views = with_gaps(random_views(6, seed=7, parts=9), [(0, 1)])
    views.trajectory[key][:3, 2, 4] = NAN
    found = views.closest_pairs(key, count=100, level=0.8)
    assert len(found) == 14
    rows = []
    for i, j in itertools.combinations(range(6), 2):
        value = float(views[key][i, j] + views[key][j, i]) / 2
        parts = ((views.trajectory[key][:, i, j] + views.trajectory[key][:, j, i]) / 2).numpy()
        low, high = numpy.quantile(parts[~numpy.isnan(parts)], [0.1, 0.9])
        if value == value:
            rows.append((value, f"task {i}", f"task {j}", int(views.common_labels[i, j]), low, high))
    rows.sort(key=lambda row: row[0], reverse=key != "saliency_distance")
    for pair, (value, task, other, labels, low, high) in zip(found, rows):
        assert (pair.task, pair.other, pair.common_labels) == (task, other, labels)
        assert (pair.value, pair.low, pair.high) == pytest.approx((value, low, high), abs=1e-12)
    assert views.closest_pairs(key, 3, 0.8) == found[:3]
    assert views.closest_pairs(key, 3, 0.2) != found[:3]


def test_closest_pairs_without_a_trajectory() -> None:
    views = random_views(3, parts=0, matrices={"saliency_distance": torch.tensor([[0.0, 2, 0], [2, 0, 2], [0, 2, 0]])})
    counts = views.common_labels.tolist()
    assert views.closest_pairs("saliency_distance") == [
        ClosePair("task 0", "task 2", 0.0, counts[0][2], None, None),
        ClosePair("task 0", "task 1", 2.0, counts[0][1], None, None),
        ClosePair("task 1", "task 2", 2.0, counts[1][2], None, None),
    ]
    assert str(views.closest_pairs("saliency_distance")[0].value) == "0.0"
    assert random_views(3, parts=1).closest_pairs("tag")[0].low is None  # one part is no interval


def test_closest_pairs_of_wrong_arguments() -> None:
    views = random_views(3)
    with pytest.raises(ConfigurationError, match="unknown view 'cosine'. Choose one of 'saliency_distance'"):
        views.closest_pairs("cosine")
    with pytest.raises(ConfigurationError, match="count must be at least 1, found 0"):
        views.closest_pairs("tag", count=0)
    for level in (0, 1, 95):
        with pytest.raises(ConfigurationError, match="level must be in"):
            views.closest_pairs("tag", level=level)


def test_compare_views() -> None:
    numpy = pytest.importorskip("numpy")
    trainings = [random_views(6, seed=seed) for seed in range(4)]
    trainings[2] = with_gaps(trainings[2], list(itertools.combinations(range(6), 2)), ["tag"])
    shuffled = [own.subset([*own.tasks[seed:], *own.tasks[:seed]]) for seed, own in enumerate(trainings)]
    for given in (trainings, shuffled):
        found = compare_views(given)
        each = numpy.stack([own.rank_correlations().numpy() for own in trainings])
        assert (found.views, found.trainings) == (tuple(VIEWS), 4)
        assert numpy.isnan(each).sum() == 13
        assert abs(found.mean.numpy() - numpy.nanmean(each, 0)).max() < 1e-12
        assert abs(found.std.numpy() - numpy.nanstd(each, 0, ddof=1)).max() < 1e-12
        for place, key in enumerate(VIEWS):
            again = [
                float(stats.spearmanr(one.pair_values()[place], other.pair_values()[place]).statistic)
                for one, other in itertools.combinations(trainings, 2)
            ]
            assert found.over_seeds[place].item() == pytest.approx(numpy.nanmean(again), abs=1e-12), key


def test_one_training_has_no_spread() -> None:
    found = compare_views([random_views(4)])
    assert bool(found.std.isnan().all())
    assert bool(found.over_seeds.isnan().all())
    assert not bool(found.mean.isnan().any())


def test_compare_views_of_different_trainings() -> None:
    views = random_views(4)
    with pytest.raises(WrongTypeError, match=r"list of RelationViews. Pass \[views\]"):
        compare_views(views)
    with pytest.raises(ConfigurationError, match="trainings is empty"):
        compare_views([])
    with pytest.raises(TaskError, match="trainings have different tasks"):
        compare_views([views, views.subset(views.tasks[:3])])
    fewer = RelationViews(views.tasks, {"tag": views["tag"]}, views.common_labels)
    with pytest.raises(ConfigurationError, match="trainings have different views"):
        compare_views([views, fewer])
