"""Affinities, consensus, order, and subsets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saliency_reg.errors import ConfigurationError, NonFiniteError, TaskError
from saliency_reg.relatedness.views import VIEWS, average_linkage, scale_of

from .support import NAN, random_views, with_gaps


def slow_affinity(key: str, matrix: Tensor) -> list[list[float]]:
    """By loops, from the definition of each view."""
    values = matrix.tolist()
    size = range(len(values))
    pairs = [(i, j) for i in size for j in size if i != j]
    tag = {(i, j): (values[i][j] + values[j][i]) / 2 for i, j in pairs}

    def entry(i: int, j: int) -> float:
        own = values[i][j]
        if key == "saliency_distance":
            return 1 - own / max(values[a][b] for a, b in pairs)
        if key == "error_cooccurrence":
            return own
        if key in ("gradient_cosine", "label_correlation", "error_kappa"):
            return (1 + own) / 2
        if i == j:
            return 1.0
        if key == "relation_weights":
            return own / max(values[a][b] for a, b in pairs)
        assert key == "tag"
        return (tag[i, j] - min(tag.values())) / (max(tag.values()) - min(tag.values()))

    return [[entry(i, j) for j in size] for i in size]


@pytest.mark.parametrize("key", VIEWS)
@pytest.mark.parametrize("count", [3, 7])
def test_affinity_is_that_of_the_definition(key: str, count: int) -> None:
    views = random_views(count, seed=3)
    affinity = views.affinity(key)
    assert affinity.dtype == torch.float64
    assert (affinity - torch.tensor(slow_affinity(key, views[key])).double()).abs().max() < 1e-6
    reference = torch.tensor(slow_affinity(key, views[key]), dtype=torch.float64)
    assert (affinity - reference).abs().max() < 1e-12
    assert torch.equal(affinity, affinity.T)
    assert bool(((affinity >= 0) & (affinity <= 1)).all())
    assert torch.equal(affinity.diagonal(), torch.ones(count, dtype=torch.float64))


@pytest.mark.parametrize("key", VIEWS)
def test_closer_by_the_view_is_closer_by_affinity(key: str) -> None:
    views = random_views(6, seed=5)
    pairs = views.closest_pairs(key, count=15)
    found = [views.affinity(key)[views.tasks.index(pair.task), views.tasks.index(pair.other)].item() for pair in pairs]
    assert len(found) == 15
    assert found == sorted(found, reverse=True)


def test_views_that_say_the_same_of_all_pairs() -> None:
    views = random_views(3)
    same = {key: torch.full((3, 3), 0.25, dtype=torch.float64) for key in VIEWS}
    same["saliency_distance"] = torch.zeros(3, 3)
    same["relation_weights"] = torch.zeros(3, 3)
    views = type(views)(views.tasks, same, views.common_labels)
    off = {key: set(views.affinity(key)[~torch.eye(3, dtype=torch.bool)].tolist()) for key in VIEWS}
    assert off == {
        "saliency_distance": {1.0},
        "relation_weights": {0.0},
        "gradient_cosine": {0.625},
        "error_cooccurrence": {0.25},
        "error_kappa": {0.625},
        "label_correlation": {0.625},
        "tag": {0.5},
    }
    assert views.order() == views.tasks
    assert bool(views.rank_correlations().isnan().all())


@pytest.mark.parametrize("key", VIEWS)
def test_pairs_that_are_not_known_are_named_or_filled(key: str) -> None:
    whole = random_views(5)
    views = with_gaps(whole, [(0, 3), (1, 2)])
    with pytest.raises(
        NonFiniteError, match=rf"{key}' knows nothing of 'task 0' and 'task 3', 'task 1' and 'task 2'. Use"
    ):
        views.affinity(key)
    filled = views.affinity(key, fill=0.125)
    assert filled[0, 3] == filled[3, 0] == filled[1, 2] == 0.125
    assert not bool(filled.isnan().any())
    assert torch.equal(filled.diagonal(), torch.ones(5, dtype=torch.float64))
    with pytest.raises(ConfigurationError, match=r"fill must be an affinity in \[0, 1\], found 1.5"):
        views.affinity(key, fill=1.5)


def test_a_task_of_which_nothing_is_known_is_named_alone() -> None:
    views = with_gaps(random_views(4), [(2, other) for other in range(4)])
    with pytest.raises(NonFiniteError, match=r"'tag' knows nothing of 'task 2' with any other task. Use views.subset"):
        views.affinity("tag")
    with pytest.raises(NonFiniteError, match="any view knows nothing of 'task 2'"):
        views.consensus()
    assert views.affinity("tag", fill=0.0)[2].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert sorted(views.order()) == sorted(views.tasks)
    assert not bool(views.subset(["task 0", "task 1", "task 3"]).affinity("tag").isnan().any())


def test_one_direction_of_tag_is_not_enough() -> None:
    views = random_views(3)
    views["tag"][0, 1] = NAN
    with pytest.raises(NonFiniteError, match="of 'task 0' and 'task 1'"):
        views.affinity("tag")


def test_consensus_is_the_mean_rank_of_each_pair() -> None:
    views = with_gaps(random_views(5, seed=2), [(0, 4)], ["label_correlation", "tag"])
    stats = pytest.importorskip("scipy.stats")
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    ranks: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
    for key, kind in VIEWS.items():
        matrix = (views[key] + views[key].T) / 2
        known = [pair for pair in pairs if not math.isnan(matrix[pair])]
        assert len(known) == (9 if key in ("label_correlation", "tag") else 10)
        sign = -1 if kind.closer == "smaller" else 1
        for pair, rank in zip(known, stats.rankdata([sign * float(matrix[pair]) for pair in known])):
            ranks[pair].append((rank - 1) / (len(known) - 1))
    consensus = views.consensus()
    assert len(ranks[0, 4]) == 5
    for i, j in pairs:
        assert consensus[i, j].item() == pytest.approx(sum(ranks[i, j]) / len(ranks[i, j]), abs=1e-12)
    assert torch.equal(consensus, consensus.T)
    assert consensus.diagonal().tolist() == [1.0] * 5


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [2, 3, 9, 20])
def test_average_linkage_is_that_of_scipy(seed: int, count: int) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    close = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close = (close + close.T) / 2
    merges, order = average_linkage(close)
    row, column = torch.triu_indices(count, count, 1)
    tree = hierarchy.linkage((1 - close)[row, column].numpy(), "average").tolist()
    assert [{first, second} for first, second, _ in merges] == [{int(own[0]), int(own[1])} for own in tree]
    assert [height for _, _, height in merges] == pytest.approx([1 - own[2] for own in tree], abs=1e-8)
    # Each group lies together.
    members = [{task} for task in range(count)]
    for first, second, _ in merges:
        members.append(members[first] | members[second])
        places = sorted(order.index(task) for task in members[-1])
        assert places == list(range(places[0], places[0] + len(places)))
    assert sorted(order) == list(range(count))
    assert order[0] < order[-1]


def test_order_puts_duplicates_together() -> None:
    """Nine tasks, three of each kind, mixed up: every view and the consensus keep the kinds together."""
    kinds = [0, 1, 2, 2, 0, 1, 1, 2, 0]
    whole = random_views(3, seed=1, parts=0)
    places = torch.tensor(kinds)
    matrices = {key: matrix[places[:, None], places].clone() for key, matrix in whole.matrices.items()}
    for key, matrix in matrices.items():  # a view of a task and its duplicate: as close as can be
        closest = 0.0 if key == "saliency_distance" else 1.0 if VIEWS[key].highest == 1 else 9.0
        matrix[places[:, None] == places] = closest
    views = random_views(9, parts=0, matrices=matrices)
    found = [kinds[views.tasks.index(task)] for task in views.order()]
    assert [found[0:3], found[3:6], found[6:9]] == [[own] * 3 for own in (found[0], found[3], found[6])]
    for key in VIEWS:
        order = [kinds[place] for place in average_linkage(views.affinity(key))[1]]
        assert [len(set(order[start : start + 3])) for start in (0, 3, 6)] == [1, 1, 1], key


@pytest.mark.parametrize("seed", range(4))
def test_all_follows_a_permutation(seed: int) -> None:
    views = with_gaps(random_views(8, seed=seed), [(1, 5)], ["label_correlation"])
    places = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
    turned = views.subset([views.tasks[place] for place in places])
    assert turned.tasks == tuple(views.tasks[place] for place in places)
    index = torch.tensor(places)
    for key in VIEWS:
        assert torch.equal(turned.affinity(key, fill=0.5), views.affinity(key, fill=0.5)[index[:, None], index])
        pairs = [
            [
                (frozenset((own.task, own.other)), own.value, own.common_labels, own.low, own.high)
                for own in one.closest_pairs(key, 28)
            ]
            for one in (views, turned)
        ]
        assert pairs[0] == pairs[1]
    assert (turned.rank_correlations() - views.rank_correlations()).abs().max() < 1e-12
    assert (turned.consensus() - views.consensus()[index[:, None], index]).abs().max() < 1e-12
    assert turned.order() in (views.order(), views.order()[::-1])
    assert turned.skill.tolist() == views.skill[index].tolist()
    assert turned.subset(views.tasks)["tag"].equal(views["tag"])


def test_subset_names_tasks() -> None:
    views = random_views(4)
    assert views.subset(["task 2", "task 0"])["tag"].tolist() == [
        [views["tag"][2, 2].item(), views["tag"][2, 0].item()],
        [views["tag"][0, 2].item(), views["tag"][0, 0].item()],
    ]
    assert views.subset(["task 2", "task 0"]).trajectory["tag"].shape == (6, 2, 2)
    with pytest.raises(TaskError, match=r"subset names \['cat'\], which are not tasks. The tasks are \['task 0'"):
        views.subset(["cat", "task 0"])
    with pytest.raises(TaskError, match="more than once"):
        views.subset(["task 1", "task 1"])


def test_colours_say_who_is_close() -> None:
    """The closest pair has the strongest orange in every view; 0 has none where signs count."""
    views = random_views(6, seed=4)
    for key, kind in VIEWS.items():
        scale = scale_of(kind, views[key])
        shades = [scale.shade(pair.value) for pair in views.closest_pairs(key, 15)]
        assert shades == sorted(shades, reverse=True), key
        assert -1 <= shades[-1] <= shades[0] <= 1
        if kind.symmetric and not kind.signed:
            assert shades[0] == pytest.approx(1.0) or key == "relation_weights"
        if kind.signed:
            assert scale.shade(0.0) == 0.0
        assert scale.shade(1e9) in (-1.0, 0.0, 1.0)
    weak = scale_of(VIEWS["gradient_cosine"], torch.full((3, 3), 0.01))
    assert 0 < weak.shade(0.01) <= 0.1  # small cosines look small
    level = scale_of(VIEWS["relation_weights"], torch.full((3, 3), 0.5))
    assert level.shade(0.5) == 0.0  # uniform weights are no preference
    nothing = scale_of(VIEWS["saliency_distance"], torch.full((3, 3), NAN))
    assert nothing.high > nothing.low
