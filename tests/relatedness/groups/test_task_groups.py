"""Clusters of an affinity, against scikit-learn and SciPy."""

from __future__ import annotations

import warnings

import pytest
import torch

from saliency_reg import task_groups
from saliency_reg.relatedness.groups import average_linkage
from saliency_reg.relatedness.groups.spectral import k_means, spectral_embedding

from .support import (
    as_sets,
    duplicates,
    lu_cost,
    published,
    random_affinity,
    random_symmetric,
    set_partitions,
)


def partition(labels: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, other in enumerate(labels) if other == label) for label in set(labels)}


@pytest.mark.parametrize("seed", range(40))
def test_spectral_groups_are_those_of_scikit_learn(seed: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    size = 4 + seed % 12
    number = 2 + seed % (size - 2)
    affinity = random_affinity(size, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its eigensolver, on small matrices
        labels = cluster.SpectralClustering(number, affinity="precomputed", n_init=50, random_state=0).fit_predict(
            affinity.numpy()
        )
    assert as_sets(task_groups(affinity, groups=number)) == partition(labels.tolist())


@pytest.mark.parametrize("seed", range(10))
def test_k_means_finds_the_least_inertia_of_all_partitions(seed: int) -> None:
    points = spectral_embedding(random_symmetric(7, seed), 3)

    def inertia(groups: list[list[int]]) -> float:
        return sum(float((points[group] - points[group].mean(dim=0)).square().sum()) for group in groups)

    best = min(inertia(groups) for groups in set_partitions(7) if len(groups) == 3)
    labels, found = k_means(points, 3, seed=0)
    assert found.min().item() == pytest.approx(best, abs=1e-12)
    assert all(len(set(row)) == 3 for row in labels.tolist())


@pytest.mark.parametrize("seed", range(20))
def test_average_linkage_is_that_of_scipy(seed: int) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    distance = pytest.importorskip("scipy.spatial.distance")
    affinity = random_symmetric(3 + seed, seed)
    expected = hierarchy.linkage(distance.squareform((1 - affinity).fill_diagonal_(0.0).numpy()), method="average")
    torch.testing.assert_close(average_linkage(affinity), torch.from_numpy(expected), rtol=0, atol=1e-10)
    for number in (1, 2, 3):
        labels = hierarchy.fcluster(expected, number, criterion="maxclust")
        assert as_sets(task_groups(affinity, groups=number, method="average")) == partition(labels.tolist())
    for height in (0.3, 0.5, 0.6):
        labels = hierarchy.fcluster(expected, height, criterion="distance")
        assert as_sets(task_groups(affinity, method="average", distance=height)) == partition(labels.tolist())


@pytest.mark.parametrize("method", ["spectral", "average"])
@pytest.mark.parametrize("copies", [(2, 2, 2), (5, 1, 3), (4, 4, 4), (1, 1, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_duplicates_of_three_tasks_are_three_groups(method: str, copies: tuple[int, ...], seed: int) -> None:
    affinity, expected = duplicates(copies, seed)
    assert as_sets(task_groups(affinity, method=method)) == expected
    assert as_sets(task_groups(affinity, groups=3, method=method)) == expected
    assert as_sets(task_groups(affinity.float(), groups=3, method=method)) == expected


@pytest.mark.parametrize("method", ["spectral", "average"])
@pytest.mark.parametrize("groups", [None, 1, 2, 4, 8])
def test_order_and_scale_play_no_part(method: str, groups: int | None) -> None:
    for seed in range(5):
        affinity = random_affinity(8, seed)
        names = list("abcdefgh")
        found = {frozenset(group) for group in task_groups(affinity, names, groups, method=method)}
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
        shuffled = [names[i] for i in order.tolist()]
        permuted = task_groups(affinity[order][:, order], shuffled, groups, method=method)
        assert {frozenset(group) for group in permuted} == found
        if groups is not None:
            assert {frozenset(group) for group in task_groups(0.3 * affinity, names, groups, method=method)} == found
            assert len(found) == groups


@pytest.mark.parametrize("method", ["spectral", "average"])
def test_the_number_is_that_of_least_cost(method: str) -> None:
    equal = 0
    for seed in range(12):
        affinity = random_affinity(5 + seed % 3, seed)
        rows = affinity.tolist()
        best = min(lu_cost(rows, groups, 1 / 32, 1.0) for groups in set_partitions(len(rows)))
        found = [[int(name) for name in group] for group in task_groups(affinity, method=method)]
        cost = lu_cost(rows, found, 1 / 32, 1.0)
        assert cost >= best - 1e-12
        equal += cost <= best + 1e-12
    assert equal > 6  # more often than not


@pytest.mark.parametrize("method", ["spectral", "average"])
def test_groups_get_fewer_as_they_cost_more(method: str) -> None:
    affinity = random_affinity(9, 2)
    counts = [len(task_groups(affinity, method=method, group_cost=cost)) for cost in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 9
    assert counts[-1] == 1


def test_a_task_without_relations_is_alone() -> None:
    affinity = torch.eye(5)
    affinity[:4, :4] = torch.tensor([[1, 0.9, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0.8], [0, 0, 0.8, 1]])
    for method in ("spectral", "average"):
        assert task_groups(affinity, groups=3, method=method) == (("0", "1"), ("2", "3"), ("4",))


def test_groups_of_a_published_matrix() -> None:
    tasks, gains = published("taskonomy")
    between = (gains + gains.T) / 2
    others = ~torch.eye(5, dtype=torch.bool)
    low, high = between[others].min(), between[others].max()
    affinity = ((between - low) / (high - low)).fill_diagonal_(1.0)
    for method in ("spectral", "average"):
        assert task_groups(affinity, tasks, 2, method=method) == (
            ("segmentation", "depth", "normals"),
            ("keypoints", "edges"),
        )


def test_many_tasks() -> None:
    affinity, expected = duplicates([9] * 7, seed=1)
    assert as_sets(task_groups(affinity, groups=7)) == expected
    assert as_sets(task_groups(affinity, groups=7, method="average")) == expected
