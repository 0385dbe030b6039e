"""Affinity of branches, separation cost, and the partition of least cost (Lu et al.)."""

from __future__ import annotations

import pytest
import torch

from saliency_reg.relatedness.groups import branch_affinity, choose_partition, separation_cost

from .support import lu_cost, random_affinity, random_symmetric, set_partitions


@pytest.mark.parametrize("seed", range(5))
def test_branch_affinity_is_the_double_loop(seed: int) -> None:
    affinity = random_symmetric(7, seed)
    branches = [[0, 3], [1], [6, 2, 5, 4]]
    rows = affinity.tolist()
    one_way = [[sum(min(rows[i][j] for j in l) for i in k) / len(k) for l in branches] for k in branches]  # noqa: E741
    expected = [[(one_way[k][l] + one_way[l][k]) / 2 for l in range(3)] for k in range(3)]  # noqa: E741
    torch.testing.assert_close(branch_affinity(affinity, branches), torch.tensor(expected, dtype=torch.float64))


def test_a_branch_of_different_tasks_is_not_one_with_itself() -> None:
    affinity = torch.tensor([[1.0, 0.4, 0.2], [0.4, 1.0, 0.3], [0.2, 0.3, 1.0]])
    found = branch_affinity(affinity, [[0, 1], [2]])
    assert found[0, 0].item() == pytest.approx(0.4)
    assert found[1, 1].item() == 1.0
    assert found[0, 1].item() == pytest.approx((0.25 + 0.2) / 2)


def test_branches_of_one_task_have_the_affinity_of_the_tasks() -> None:
    affinity = random_affinity(5, 0)
    torch.testing.assert_close(branch_affinity(affinity, [[i] for i in range(5)]), affinity)


@pytest.mark.parametrize("seed", range(3))
def test_separation_cost_is_the_loop(seed: int) -> None:
    affinity = random_symmetric(5, seed)
    for groups in set_partitions(5):
        expected = lu_cost(affinity.tolist(), groups, 0.0, 1.0)
        assert separation_cost(affinity, groups) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("make", [random_affinity, random_symmetric])
def test_never_better_than_brute_force_and_usually_equal(make) -> None:
    equal, trials = 0, 24
    for seed in range(trials):
        size = 3 + seed % 6  # up to 8
        affinity = make(size, seed)
        branch_cost, weight = (1, 2, 4)[seed % 3] / 64, 2.0  # as published
        best = min(lu_cost(affinity.tolist(), groups, branch_cost, weight) for groups in set_partitions(size))
        groups = choose_partition(affinity, branch_cost=branch_cost, separation_weight=weight, largest=size, seed=0)
        cost = lu_cost(affinity.tolist(), groups, branch_cost, weight)
        assert cost >= best - 1e-12
        equal += cost <= best + 1e-12
    assert equal >= 0.8 * trials


@pytest.mark.parametrize("branch_cost", [8 / 64, 16 / 64, 32 / 64])
def test_where_branches_are_dear_the_cost_is_close_to_the_least(branch_cost: float) -> None:
    """The least cost then often has one large group and tasks alone, which is not what spectral clustering looks for."""
    excess = []
    for seed in range(12):
        affinity = random_affinity(5 + seed % 3, seed)
        rows = affinity.tolist()
        best = min(lu_cost(rows, groups, branch_cost, 2.0) for groups in set_partitions(len(rows)))
        groups = choose_partition(affinity, branch_cost=branch_cost, separation_weight=2.0, largest=7, seed=0)
        excess.append(lu_cost(rows, groups, branch_cost, 2.0) / best - 1)
    assert min(excess) >= -1e-12
    assert sum(excess) / len(excess) < 0.15


@pytest.mark.parametrize("largest", [1, 2, 3, 100])
def test_no_more_groups_than_the_largest(largest: int) -> None:
    affinity = torch.eye(5, dtype=torch.float64)
    found = choose_partition(affinity, branch_cost=0.0, separation_weight=1.0, largest=largest, seed=0)
    assert len(found) == min(largest, 5)
    assert sorted(branch for group in found for branch in group) == list(range(5))


def test_costs_decide_the_ends() -> None:
    affinity = random_affinity(6, 1)
    one = choose_partition(affinity, branch_cost=1.0, separation_weight=1.0, largest=6, seed=0)
    assert one == [[0, 1, 2, 3, 4, 5]]
    free = choose_partition(affinity, branch_cost=0.0, separation_weight=1.0, largest=6, seed=0)
    assert free == [[task] for task in range(6)]
    # Nothing to gain from a split: one group.
    assert choose_partition(affinity, branch_cost=0.0, separation_weight=0.0, largest=6, seed=0) == one
    assert choose_partition(affinity[:1, :1], branch_cost=0.1, separation_weight=1.0, largest=3, seed=0) == [[0]]


def test_the_same_seed_gives_the_same_and_leaves_the_global_one_alone() -> None:
    affinity = random_symmetric(9, 3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = choose_partition(affinity, branch_cost=0.01, separation_weight=1.0, largest=9, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    assert first == choose_partition(affinity, branch_cost=0.01, separation_weight=1.0, largest=9, seed=7)
