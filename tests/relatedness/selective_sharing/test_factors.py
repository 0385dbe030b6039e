"""Gramians, factors and groups against slow and obvious references."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from saliency_reg.relatedness.selective_sharing.clusters import clusters_below, medoid, spread_out
from saliency_reg.relatedness.selective_sharing.factors import (
    GRAMIANS,
    cosines,
    gramian_of_inputs,
    task_factors,
    unit_rows,
)

pytestmark = pytest.mark.usefixtures("float64")


def moments(gradients: Tensor, compare: str) -> Tensor:
    """The rows that are factorised, ``[T, N]``, written out."""
    rows = []
    for gradient in gradients:
        row = (gradient.T @ gradient if compare == "inputs" else gradient).flatten()
        rows.append(row / row.square().sum().sqrt())
    return torch.stack(rows)


@pytest.mark.parametrize("compare", ["inputs", "gradients"])
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("distinct", [2, 7])
def test_factors_are_those_of_the_singular_value_decomposition(compare: str, energy: float, distinct: int) -> None:
    gradients = torch.randn(7, 4, 5) * torch.logspace(-150, 150, 7).view(7, 1, 1)  # losses of very different scales
    gradients = gradients[torch.arange(7) % distinct]
    rows = moments(gradients / gradients.flatten(1).norm(dim=1).view(7, 1, 1), compare)
    left, values, _ = torch.linalg.svd(rows, full_matrices=False)
    shares = values.square().cumsum(0) / values.square().sum()
    rank = next(number for number, share in enumerate(shares.tolist(), 1) if share >= energy - 1e-9)
    expected = left[:, :rank] * values[:rank]
    found = task_factors(GRAMIANS[compare](unit_rows(gradients)), energy)
    assert found.shape == (7, rank)
    torch.testing.assert_close(found @ found.T, expected @ expected.T, rtol=0, atol=1e-10)
    norms = expected.norm(dim=1)
    torch.testing.assert_close(cosines(found), expected @ expected.T / norms.outer(norms), rtol=0, atol=1e-10)
    for column in range(rank):  # up to their signs, where singular values differ
        same = torch.minimum((found - expected)[:, column].abs().max(), (found + expected)[:, column].abs().max())
        assert same < 1e-7


def test_cosines_at_the_inputs_are_those_of_principal_angles() -> None:
    bases = [torch.linalg.qr(torch.randn(6, 3))[0] for _ in range(2)]
    angles = torch.linalg.svdvals(bases[0].T @ bases[1])  # cosines
    mixed = torch.linalg.qr(torch.randn(3, 3))[0]  # other hidden units, which do not count
    found = gramian_of_inputs(unit_rows(torch.stack([bases[0].T, mixed @ bases[1].T])))
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0], [1.0, 1.0]]) * found)
    assert found[0, 1].item() == pytest.approx(angles.square().mean().item(), abs=1e-12)
    assert found.diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-12)


def test_equal_eigenvalues_stay_together() -> None:
    """Twelve tasks that have nothing in common: any eleven of the eigenvectors would be an accident."""
    found = task_factors(torch.eye(12), 0.9)
    torch.testing.assert_close(cosines(found), torch.eye(12))


def test_a_task_of_which_nothing_is_kept_is_like_no_other() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = cosines(task_factors(rows @ rows.T, 0.7))
    assert found.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


def slow_clusters(similarities: Tensor, theta: float) -> list[list[int]]:
    clusters = [[one] for one in range(len(similarities))]
    while len(clusters) > 1:
        means = {
            (i, j): sum(1 - similarities[a, b].item() for a in one for b in other) / len(one) / len(other)
            for (i, one), (j, other) in itertools.combinations(enumerate(clusters), 2)
        }
        i, j = min(means, key=lambda pair: means[pair])
        if not means[i, j] < theta:
            break
        clusters[i] += clusters.pop(j)
    return sorted(sorted(cluster) for cluster in clusters)


@pytest.mark.parametrize("theta", [0.0, 0.3, 0.6, 1.0, 1.4, 2.1])
def test_clusters_are_those_of_a_slow_average_linkage(theta: float) -> None:
    for _ in range(10):
        rows = torch.nn.functional.normalize(torch.randn(8, 3), dim=1)
        found = clusters_below((rows @ rows.T).clamp(-1, 1), theta)
        assert found == slow_clusters(rows @ rows.T, theta)
        assert (len(found) == 8) if theta == 0 else (len(found) == 1) if theta > 2 else True


def test_theta_zero_joins_not_even_what_is_equal() -> None:
    assert clusters_below(torch.ones(3, 3), 0.0) == [[0], [1], [2]]


def within(distances: Tensor, groups: list[list[int]]) -> float:
    return sum(distances[a, b].item() for group in groups for a, b in itertools.combinations(group, 2))


def test_groups_of_different_clusters_are_spread_as_far_as_any() -> None:
    clusters = [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    near = 0
    for _ in range(20):
        points = torch.randn(9, 2) / 3 + torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]).repeat(3, 1)
        distances = torch.cdist(points, points)
        groups = spread_out(distances, clusters)
        assert sorted(itertools.chain(*groups)) == list(range(9))
        assert all(sorted(one % 3 for one in group) == [0, 1, 2] for group in groups)
        orders = list(itertools.permutations(range(3)))
        best = max(
            within(distances, [[clusters[0][n], clusters[1][p[n]], clusters[2][q[n]]] for n in range(3)])
            for p in orders
            for q in orders
        )
        assert within(distances, groups) <= best + 1e-9
        near += within(distances, groups) > best - 1e-9
    assert near >= 16  # swaps of two find it nearly always


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [5], [5, 1, 1], [4, 2], [2, 3, 4, 1]])
def test_there_are_as_many_groups_of_nearly_equal_size(sizes: list[int]) -> None:
    numbers = iter(torch.randperm(sum(sizes)).tolist())
    clusters = [sorted(itertools.islice(numbers, size)) for size in sizes]
    points = torch.randn(sum(sizes), 3)
    groups = spread_out(torch.cdist(points, points), clusters)
    assert len(groups) == len(clusters)
    assert sorted(itertools.chain(*groups)) == list(range(sum(sizes)))
    for cluster in clusters:
        counts = [len(set(cluster) & set(group)) for group in groups]
        assert max(counts) - min(counts) <= 1
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_the_medoid_is_nearest_to_the_others() -> None:
    line = torch.tensor([[0.0], [9.0], [1.0], [3.0], [50.0]])
    distances = torch.cdist(line, line)
    assert medoid(distances, [0, 1, 2, 3]) == 2  # 2 and 3 have sums of 11 and 11
    assert medoid(distances, [1, 3, 4]) == 1
    assert medoid(distances, [4]) == 4
